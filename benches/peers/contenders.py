"""Who is compared: how each stores a model in the bucket, how it is mounted or loaded, and what it is good for.

A `Contender` stores a data set once (`store`) and then serves it again and again, each time from nothing (`serve`):
a fresh mount, or a loader that fetches by itself. What it can not do it does not have, and `why_not` says why.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from servers import ACCESS_KEY, BUCKET, REGION, S3, SECRET_KEY, START_SECONDS, Failed, Nginx, Processes, run

KEY = "6d" * 32


@dataclass
class Data:
    """A model folder; `file` is the one of it that is read."""

    name: str
    folder: Path
    file: str
    # Every file of it is loaded, as one model.
    whole: bool = False
    sums: dict[str, str] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.folder / self.file

    @property
    def bytes(self) -> int:
        return self.path.stat().st_size

    @property
    def all_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def sha256(self) -> str:
        if self.file not in self.sums:
            with self.path.open("rb") as opened:
                self.sums[self.file] = hashlib.file_digest(opened, "sha256").hexdigest()
        return self.sums[self.file]


@dataclass
class Live:
    """Something that serves: the folder in which the data set's own lies, and the processes behind it."""

    folder: Path
    pids: list[int]


@dataclass
class Bed:
    """What all contenders stand on."""

    work: Path
    cache: Path
    modelfs: Path
    s3: S3
    nginx: Nginx | None
    processes: Processes
    helper: Callable[[dict[str, object]], dict[str, object]] | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def folder(self, name: str) -> Path:
        path = self.work / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def found(self, part: str, program: str) -> str | None:
        """A program of the cache folder, or else of the system."""
        mine = self.cache / part / "bin" / program
        return str(mine) if mine.is_file() else shutil.which(program)

    @contextlib.contextmanager
    def mounted(
        self, name: str, command: list[str], mountpoint: Path, there: Path, env: dict[str, str]
    ) -> Iterator[int]:
        """Runs a file system in the foreground until `there` is seen below it; takes the mount off at the end."""
        process = self.processes.start(name, command, env)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not (os.path.ismount(mountpoint) and there.exists()):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise Failed(f"{name} did not mount: {self.processes.tail(name)}")
                time.sleep(0.01)
            yield process.pid
        finally:
            unmount(mountpoint)
            self.processes.stop(process)


def unmount(mountpoint: Path) -> None:
    for attempt in range(100):
        if not os.path.ismount(mountpoint):
            return
        # Lazily at the end: a mount that somebody still holds must not outlive the run in the tree.
        subprocess.run(["umount", *(["-l"] if attempt == 99 else []), str(mountpoint)], capture_output=True)
        if os.path.ismount(mountpoint):
            time.sleep(0.05)


class Contender:
    name = ""
    # modelfs, encrypts, plain, memory: what is fair to compare with what.
    group = "plain"
    # What its numbers need to be understood, printed below the table.
    note = ""
    # Whether there is a folder to read from, and whether reading it says anything that another contender does not.
    mounts, reads = True, True

    def __init__(self, bed: Bed) -> None:
        self.bed = bed

    def why_not(self) -> str | None:
        """The reason why it cannot run here, or None."""
        return None

    def store(self, data: Data) -> None:
        """Puts the data set where it is served from, once."""

    def stored(self, data: Data) -> list[Path]:
        """Where the server keeps it: for its size, and to have it in the server's page cache before each run."""
        return []

    def stored_bytes(self, data: Data) -> int:
        return sum(path.stat().st_size for path in self.stored(data))

    def serve(self, data: Data) -> contextlib.AbstractContextManager[Live]:
        raise NotImplementedError

    def load(self, data: Data, live: Live | None) -> dict[str, object]:
        """The request for loader.py that loads the data set's files into torch."""
        assert live is not None
        return {"way": "safetensors", "paths": [str(live.folder / file) for file in weights(data)]}

    def load_model(self, data: Data, live: Live | None) -> dict[str, object]:
        """The same for a whole model."""
        assert live is not None
        return {"way": "transformers", "folder": str(live.folder)}


def weights(data: Data) -> list[str]:
    return sorted(path.name for path in data.folder.glob("*.safetensors")) if data.whole else [data.file]


def below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


class Tmpfs(Contender):
    group, note = "memory", ""

    def __init__(self, bed: Bed, huge: bool) -> None:
        super().__init__(bed)
        self.huge = huge
        self.name = "tmpfs, huge pages" if huge else "tmpfs"

    def why_not(self) -> str | None:
        return None if os.geteuid() == 0 else "mounting a tmpfs needs root"

    @contextlib.contextmanager
    def serve(self, data: Data) -> Iterator[Live]:
        mountpoint = self.bed.folder("tmpfs")
        size = data.all_bytes + (64 << 20)
        run(
            [
                "mount",
                "-t",
                "tmpfs",
                "-o",
                f"huge={'always' if self.huge else 'never'},size={size},mode=0700",
                "bench",
                str(mountpoint),
            ]
        )
        try:
            shutil.copytree(data.folder, mountpoint / data.name)
            yield Live(mountpoint / data.name, [])
        finally:
            unmount(mountpoint)


class Modelfs(Contender):
    group = "modelfs"

    def __init__(self, bed: Bed, name: str, codec: str, options: list[str], note: str = "") -> None:
        super().__init__(bed)
        self.name, self.codec, self.options, self.note = name, codec, options, note
        self.keys = bed.folder("modelfs-keys")
        self.stores = bed.folder("modelfs-stores")

    def _env(self) -> dict[str, str]:
        # The user's own keys, trust and recorded versions are neither read nor changed.
        home = str(self.keys)
        return {
            **self.bed.s3.client_env(),
            "XDG_CONFIG_HOME": home,
            "XDG_STATE_HOME": home,
            "MODELFS_STATE_DIR": f"{home}/state",
            "MODELFS_S3_ENDPOINT": self.bed.s3.endpoint,
        }

    def _prefix(self, data: Data) -> str:
        return f"modelfs-{self.codec}/{data.name}"

    def store(self, data: Data) -> None:
        if not self.stored(data):
            self.seal(data, f"s3://{BUCKET}/{self._prefix(data)}")

    def seal(self, data: Data, store: str) -> None:
        key, signing = self.keys / "key", self.keys / "signing.key"
        if not key.exists():
            run([str(self.bed.modelfs), "keygen", str(key)], self._env())
            run([str(self.bed.modelfs), "keygen", "--signing", str(signing)], self._env())
        codec = ["--codec", self.codec] if self.codec != "default" else []
        command = [
            str(self.bed.modelfs),
            "seal",
            "-q",
            str(data.folder),
            store,
            data.name,
            "--key",
            f"file:{key}",
            "--sign",
            str(signing),
        ]
        run([*command, *codec], self._env())

    def stored(self, data: Data) -> list[Path]:
        return below(self.bed.s3.folder / self._prefix(data))

    @contextlib.contextmanager
    def serve(self, data: Data) -> Iterator[Live]:
        mountpoint = self.bed.folder("modelfs")
        key, trust = self.keys / "key", self.keys / "signing.key.pub"
        command = [str(self.bed.modelfs), "mount", f"s3://{BUCKET}/{self._prefix(data)}", str(mountpoint)]
        # Room for the whole and as much again for what is on its way out; never less than it takes by itself.
        command += [
            "--key",
            f"file:{key}",
            "--trust",
            str(trust),
            "--cache",
            str(data.all_bytes + (512 << 20)),
            *self.options,
        ]
        folder = mountpoint / data.name
        with self.bed.mounted("modelfs", command, mountpoint, folder, self._env()) as pid:
            yield Live(folder, [pid])


class Uploaded(Contender):
    """One whose data are the plain files in the bucket."""

    def store(self, data: Data) -> None:
        if not self.stored(data):
            self.bed.s3.put_tree(f"plain/{data.name}", data.folder)

    def stored(self, data: Data) -> list[Path]:
        return below(self.bed.s3.folder / "plain" / data.name)


class Rclone(Uploaded):
    """With its disk cache, which made it fastest of what was tried at loads of maps (7 times), or without.

    Tried as well: 4 and 8 streams at once of 8 and 16 MiB, with and without the disk cache: slower in all but some cold
    reads.
    """

    def __init__(self, bed: Bed, crypt: bool, disk: bool = True) -> None:
        super().__init__(bed)
        self.crypt, self.disk = crypt, disk
        self.name, self.group = ("rclone crypt", "encrypts") if crypt else ("rclone", "plain")
        self.note = "--vfs-cache-mode full" + (": what was read lies decrypted on a disk" if crypt else "")
        if not disk:
            self.name += ", no disk cache"
            self.note = "as it comes; the only way in which it leaves no plaintext on a disk"
        self.program = bed.found("rclone-1.76.0", "rclone")

    def why_not(self) -> str | None:
        return None if self.program else "rclone is not installed"

    def _config(self) -> str:
        config = self.bed.work / "rclone.conf"
        if not config.exists():
            password = run([str(self.program), "obscure", KEY], {"RCLONE_CONFIG": "/dev/null"}).strip()
            config.write_text(
                f"[s3]\ntype = s3\nprovider = Other\naccess_key_id = {ACCESS_KEY}\nsecret_access_key = {SECRET_KEY}\n"
                f"region = {REGION}\nendpoint = {self.bed.s3.endpoint}\nforce_path_style = true\n"
                f"[crypt]\ntype = crypt\nremote = s3:{BUCKET}/rclone-crypt\npassword = {password}\n"
                "filename_encryption = off\ndirectory_name_encryption = false\n"
            )
        return str(config)

    def store(self, data: Data) -> None:
        if not self.crypt:
            super().store(data)
        elif not self.stored(data):
            run([str(self.program), "--config", self._config(), "copy", str(data.folder), f"crypt:{data.name}"])

    def stored(self, data: Data) -> list[Path]:
        return below(self.bed.s3.folder / ("rclone-crypt" if self.crypt else "plain") / data.name)

    @contextlib.contextmanager
    def serve(self, data: Data) -> Iterator[Live]:
        mountpoint = self.bed.folder("rclone")
        remote = "crypt:" if self.crypt else f"s3:{BUCKET}/plain"
        command = [str(self.program), "--config", self._config(), "mount", remote, str(mountpoint), "--read-only"]
        if self.disk:
            cache = self.bed.work / "rclone-cache"
            shutil.rmtree(cache, ignore_errors=True)
            command += ["--vfs-cache-mode", "full", "--cache-dir", str(cache)]
        with self.bed.mounted("rclone", command, mountpoint, mountpoint / data.name / data.file, {}) as pid:
            yield Live(mountpoint / data.name, [pid])


class S3fs(Uploaded):
    name = "s3fs"
    note = "16 parallel requests of 16 MiB; it keeps what was read in a temporary file"

    def why_not(self) -> str | None:
        return None if shutil.which("s3fs") else "s3fs is not installed"

    @contextlib.contextmanager
    def at(self, prefix: str, mountpoint: Path, there: Path) -> Iterator[Live]:
        secret = self.bed.work / "s3fs.pass"
        secret.write_text(f"{ACCESS_KEY}:{SECRET_KEY}\n")
        secret.chmod(0o600)
        options = [
            f"url={self.bed.s3.endpoint}",
            f"passwd_file={secret}",
            f"endpoint={REGION}",
            "use_path_request_style",
            "ro",
        ]
        options += ["parallel_count=16", "multipart_size=16"]
        command = ["s3fs", f"{BUCKET}:/{prefix}", str(mountpoint), "-f"]
        for option in options:
            command += ["-o", option]
        with self.bed.mounted("s3fs", command, mountpoint, there, {}) as pid:
            yield Live(mountpoint, [pid])

    @contextlib.contextmanager
    def serve(self, data: Data) -> Iterator[Live]:
        mountpoint = self.bed.folder("s3fs")
        with self.at(f"plain/{data.name}", mountpoint, mountpoint / data.file) as live:
            yield live


class Mountpoint(Uploaded):
    name = "mountpoint-s3"
    note = "its file system crate with the settings of its own program; no disk cache"

    def __init__(self, bed: Bed) -> None:
        super().__init__(bed)
        self.program = bed.found("mountpoint-s3-0.11.0", "mountpoint-s3-peer")

    def why_not(self) -> str | None:
        return None if self.program else "mountpoint-s3 is not built (tests/parts/install.sh bench-peers says why)"

    @contextlib.contextmanager
    def at(self, prefix: str, mountpoint: Path, there: Path) -> Iterator[Live]:
        command = [str(self.program), self.bed.s3.endpoint, BUCKET, f"{prefix}/", str(mountpoint)]
        with self.bed.mounted("mountpoint-s3", command, mountpoint, there, self.bed.s3.client_env()) as pid:
            yield Live(mountpoint, [pid])

    @contextlib.contextmanager
    def serve(self, data: Data) -> Iterator[Live]:
        mountpoint = self.bed.folder("mountpoint-s3")
        with self.at(f"plain/{data.name}", mountpoint, mountpoint / data.file) as live:
            yield live


class Gocryptfs(Contender):
    """Over a mount of the bucket, for it has no store of its own."""

    group = "encrypts"

    def __init__(self, bed: Bed) -> None:
        super().__init__(bed)
        mountpoint, s3fs = Mountpoint(bed), S3fs(bed)
        self.under: Mountpoint | S3fs = s3fs if mountpoint.why_not() else mountpoint
        self.name = f"gocryptfs on {self.under.name}"
        self.note = f"its folder is a mount of the bucket by {self.under.name}"

    def why_not(self) -> str | None:
        return self.under.why_not() or (None if shutil.which("gocryptfs") else "gocryptfs is not installed")

    def _pass(self) -> str:
        file = self.bed.work / "gocryptfs.pass"
        file.write_text(KEY + "\n")
        return str(file)

    def store(self, data: Data) -> None:
        if self.stored(data):
            return
        folder, mountpoint = self.bed.folder(f"gocryptfs-{data.name}"), self.bed.folder("gocryptfs-init")
        run(["gocryptfs", "-init", "-q", "-scryptn", "10", "-plaintextnames", "-passfile", self._pass(), str(folder)])
        command = ["gocryptfs", "-fg", "-q", "-passfile", self._pass(), str(folder), str(mountpoint)]
        with self.bed.mounted("gocryptfs", command, mountpoint, mountpoint, {}):
            shutil.copytree(data.folder, mountpoint, dirs_exist_ok=True)
        self.bed.s3.put_tree(f"gocryptfs/{data.name}", folder)
        shutil.rmtree(folder)

    def stored(self, data: Data) -> list[Path]:
        return below(self.bed.s3.folder / "gocryptfs" / data.name)

    @contextlib.contextmanager
    def serve(self, data: Data) -> Iterator[Live]:
        lower, mountpoint = self.bed.folder("gocryptfs-lower"), self.bed.folder("gocryptfs")
        with self.under.at(f"gocryptfs/{data.name}", lower, lower / "gocryptfs.conf") as under:
            command = ["gocryptfs", "-fg", "-q", "-ro", "-passfile", self._pass(), str(lower), str(mountpoint)]
            with self.bed.mounted("gocryptfs", command, mountpoint, mountpoint / data.file, {}) as pid:
                yield Live(mountpoint, [pid, *under.pids])


class Runai(Uploaded):
    name = "Run:ai streamer"
    note = "a loader, not a mount; its defaults"
    mounts = False

    def why_not(self) -> str | None:
        return None if self.bed.helper else "needs torch (tests/parts/install.sh clients-torch bench-peers)"

    def load(self, data: Data, live: Live | None) -> dict[str, object]:
        return {"way": "runai", "paths": [f"s3://{BUCKET}/plain/{data.name}/{file}" for file in weights(data)]}

    def load_model(self, data: Data, live: Live | None) -> dict[str, object]:
        return {**self.load(data, live), "way": "runai model", "folder": str(data.folder)}


class Tensorizer(Contender):
    name, group = "tensorizer, encrypted", "encrypts"
    note = "a loader, not a mount; encryption with a random key, 4 readers"
    mounts = False

    def why_not(self) -> str | None:
        return None if self.bed.helper else "needs torch (tests/parts/install.sh clients-torch bench-peers)"

    def store(self, data: Data) -> None:
        if self.stored(data):
            return
        out = self.bed.work / "model.tensors"
        request: dict[str, object] = {
            "way": "tensorize",
            "paths": [str(data.folder / file) for file in weights(data)],
            "options": {"key": KEY, "out": str(out)},
        }
        assert self.bed.helper is not None
        told = self.bed.helper(request)
        if "error" in told:
            raise Failed(f"tensorizer: {told['error']}")
        self.bed.s3.put(f"tensorizer/{data.name}/model.tensors", out)
        out.unlink()

    def stored(self, data: Data) -> list[Path]:
        return below(self.bed.s3.folder / "tensorizer" / data.name)

    def load(self, data: Data, live: Live | None) -> dict[str, object]:
        options = {"key": KEY, "endpoint": f"127.0.0.1:{self.bed.s3.port}", "readers": 4}
        return {
            "way": "tensorizer",
            "paths": [f"s3://{BUCKET}/tensorizer/{data.name}/model.tensors"],
            "options": options,
        }

    def load_model(self, data: Data, live: Live | None) -> dict[str, object]:
        return {**self.load(data, live), "way": "tensorizer model", "folder": str(data.folder)}


class Fast(Tmpfs):
    """fastsafetensors reads files; it is given the fastest there are."""

    reads = False

    def __init__(self, bed: Bed) -> None:
        super().__init__(bed, huge=True)
        self.name = "fastsafetensors on tmpfs"
        self.note = "a loader of local files; on the CPU, without GPU direct storage"

    def why_not(self) -> str | None:
        return super().why_not() or (
            None if self.bed.helper else "needs torch (tests/parts/install.sh clients-torch bench-peers)"
        )

    def load(self, data: Data, live: Live | None) -> dict[str, object]:
        return {**super().load(data, live), "way": "fastsafetensors"}


def modelfs_variants(bed: Bed) -> list[Modelfs]:
    """The default and what it can be told; codecs only where `seal` knows the word."""
    knows_codec = "--codec" in run([str(bed.modelfs), "seal", "--help"])
    codec = "auto" if knows_codec else "default"
    whole = ["--open", "whole"]
    variants = [
        Modelfs(bed, "modelfs", codec, [], "as it comes: open=auto, strict"),
        Modelfs(bed, "modelfs, open=lazy", codec, ["--open", "lazy"], "no open waits"),
        Modelfs(bed, "modelfs, open=whole", codec, whole, "every open waits for the whole file"),
        Modelfs(
            bed,
            "modelfs, whole, aead",
            codec,
            [*whole, "--verify", "aead"],
            "tags only, no signed hash: the work that gocryptfs and rclone do",
        ),
    ]
    if knows_codec:
        variants.append(Modelfs(bed, "modelfs, whole, no codec", "none", whole, "sealed with --codec none"))
    return variants


def everybody(bed: Bed) -> list[Contender]:
    return [
        Tmpfs(bed, huge=False),
        Tmpfs(bed, huge=True),
        *modelfs_variants(bed),
        Rclone(bed, crypt=False),
        S3fs(bed),
        Mountpoint(bed),
        Runai(bed),
        Rclone(bed, crypt=True),
        Rclone(bed, crypt=True, disk=False),
        Gocryptfs(bed),
        Tensorizer(bed),
        Fast(bed),
    ]

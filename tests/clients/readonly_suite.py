"""What a read-only filesystem must answer, asked one system call at a time over a mounted model.

Two halves. Every call that would change something must be refused, with one of the errors POSIX and Linux allow there.
Every read must answer as a local disk would: at, across and past the end of the file, with nothing to read, with
several buffers, through splice and sendfile. A wrong answer is one FAIL line; the exit status is 1 if there is any.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import fcntl
import io
import mmap
import os
import random
import stat
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from common import Differs, Tally, require_equal

LIBC = ctypes.CDLL(None, use_errno=True)
FS_IOC_SETFLAGS = 0x40086602
FALLOC_FL_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01
RENAME_EXCHANGE = 2
AT_FDCWD = -100
CANARY = b"a read-only filesystem must not take this"


def libc_call(name: str, *arguments: object) -> int:
    """For calls Python has no function for; raises OSError as Python's own do."""
    result = getattr(LIBC, name)(*arguments)
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def refused(tally: Tally, name: str, wanted: set[int], call: Callable[[], object]) -> None:
    with tally.check(f"refused: {name}") as step:
        try:
            call()
        except OSError as error:
            if error.errno not in wanted:
                raise Differs(f"{_name(error.errno)}, wanted {'/'.join(sorted(map(_name, wanted)))}") from error
            step.note = _name(error.errno)
        else:
            raise Differs("it succeeded")


def _name(code: int | None) -> str:
    return errno.errorcode.get(code or 0, str(code))


def opened(path: Path, flags: int) -> Callable[[], None]:
    return lambda: os.close(os.open(path, flags, 0o644))


def check_refusals(root: Path, file: Path, tally: Tally) -> None:
    """EROFS comes from the mount, EACCES and EPERM from modes or the kernel before the mount is asked.

    EXDEV and EBUSY stand where the kernel looks at the mount before its flags (rename onto itself, rmdir of a mount).
    """
    new = root / "modelfs-readonly-suite"
    folder = file.parent
    no = {errno.EROFS}
    denied = no | {errno.EACCES, errno.EPERM}
    # Extended attributes: a filesystem may also say that it has none.
    attributes = denied | {errno.EOPNOTSUPP}

    refused(tally, "open O_WRONLY", denied, opened(file, os.O_WRONLY))
    refused(tally, "open O_RDWR", denied, opened(file, os.O_RDWR))
    refused(tally, "open O_RDONLY|O_TRUNC", denied, opened(file, os.O_RDONLY | os.O_TRUNC))
    refused(tally, "open O_WRONLY|O_APPEND", denied, opened(file, os.O_WRONLY | os.O_APPEND))
    refused(tally, "open O_CREAT of a new name", denied, opened(new, os.O_CREAT | os.O_WRONLY))
    refused(tally, "open O_CREAT|O_EXCL of an old name", denied | {errno.EEXIST}, opened(file, os.O_CREAT | os.O_EXCL))
    refused(tally, "open O_TMPFILE", denied | {errno.EOPNOTSUPP}, opened(folder, os.O_TMPFILE | os.O_RDWR))
    refused(tally, "open O_DIRECTORY of a file", {errno.ENOTDIR}, opened(file, os.O_DIRECTORY))
    refused(tally, "open of a directory for writing", {errno.EISDIR, *denied}, opened(folder, os.O_WRONLY))
    refused(tally, "truncate", denied, lambda: os.truncate(file, 0))
    refused(tally, "rename", denied, lambda: os.rename(file, new))
    refused(tally, "rename of a directory", denied | {errno.EBUSY, errno.EXDEV}, lambda: os.rename(folder, new))
    refused(
        tally,
        "renameat2 RENAME_EXCHANGE",
        denied | {errno.EINVAL},
        lambda: libc_call("renameat2", AT_FDCWD, bytes(file), AT_FDCWD, bytes(folder / "x"), RENAME_EXCHANGE),
    )
    refused(tally, "mkdir", denied, lambda: os.mkdir(new))
    refused(tally, "rmdir", denied | {errno.EBUSY, errno.ENOTEMPTY}, lambda: os.rmdir(folder))
    refused(tally, "unlink", denied, lambda: os.unlink(file))
    refused(tally, "link", denied, lambda: os.link(file, new))
    refused(
        tally, "link to another filesystem", {errno.EXDEV}, lambda: os.link(file, "/dev/shm/modelfs-readonly-suite")
    )
    refused(tally, "symlink", denied, lambda: os.symlink("target", new))
    refused(tally, "mknod FIFO", denied, lambda: os.mknod(new, stat.S_IFIFO | 0o644))
    refused(tally, "mknod regular", denied, lambda: os.mknod(new, stat.S_IFREG | 0o644))
    refused(tally, "mknod device", denied, lambda: os.mknod(new, stat.S_IFCHR | 0o644, os.makedev(1, 3)))
    refused(tally, "chmod", denied, lambda: os.chmod(file, 0o777))
    refused(tally, "chmod of a directory", denied, lambda: os.chmod(folder, 0o777))
    refused(tally, "chown", denied, lambda: os.chown(file, 1, 1))
    refused(tally, "lchown", denied, lambda: os.lchown(file, 1, 1))
    refused(tally, "utimensat to a time", denied, lambda: os.utime(file, (1, 1)))
    refused(tally, "utimensat to now", denied, lambda: os.utime(file))
    refused(tally, "setxattr user.x", attributes, lambda: os.setxattr(file, "user.x", b"1"))
    refused(tally, "setxattr security.x", attributes, lambda: os.setxattr(file, "security.x", b"1"))
    refused(tally, "removexattr", attributes | {errno.ENODATA}, lambda: os.removexattr(file, "user.x"))
    refused(tally, "access W_OK", denied, lambda: libc_call("access", bytes(file), os.W_OK))

    descriptor = os.open(file, os.O_RDONLY)
    try:
        bad = {errno.EBADF, errno.EINVAL, errno.EROFS}
        refused(tally, "write to a descriptor", bad, lambda: os.write(descriptor, CANARY))
        refused(tally, "pwrite to a descriptor", bad, lambda: os.pwrite(descriptor, CANARY, 0))
        refused(tally, "ftruncate", bad, lambda: os.ftruncate(descriptor, 0))
        refused(tally, "fallocate", bad | {errno.EOPNOTSUPP}, lambda: os.posix_fallocate(descriptor, 0, 4096))
        refused(
            tally,
            "fallocate PUNCH_HOLE",
            bad | {errno.EOPNOTSUPP},
            lambda: libc_call(
                "fallocate",
                descriptor,
                FALLOC_FL_PUNCH_HOLE_KEEP_SIZE,
                ctypes.c_longlong(0),
                ctypes.c_longlong(4096),
            ),
        )
        refused(tally, "fchmod", denied, lambda: os.fchmod(descriptor, 0o777))
        refused(tally, "fchown", denied, lambda: os.fchown(descriptor, 1, 1))
        refused(tally, "futimens", denied, lambda: os.utime(descriptor, (1, 1)))
        refused(tally, "fsetxattr", attributes, lambda: os.setxattr(descriptor, "user.x", b"1"))
        refused(
            tally,
            "ioctl FS_IOC_SETFLAGS",
            denied | {errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOSYS},
            lambda: fcntl.ioctl(descriptor, FS_IOC_SETFLAGS, struct.pack("l", 0x10)),
        )
        refused(
            tally,
            "an ioctl nobody knows",
            {errno.ENOTTY, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL},
            lambda: fcntl.ioctl(descriptor, 0xC0DE),
        )
        refused(
            tally,
            "mmap PROT_WRITE|MAP_SHARED",
            {errno.EACCES, errno.EPERM, errno.ENODEV},
            lambda: mmap.mmap(descriptor, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
        )
        with tempfile.TemporaryFile() as source:
            source.write(CANARY)
            source.flush()
            refused(
                tally,
                "copy_file_range into the mount",
                bad,
                lambda: os.copy_file_range(source.fileno(), descriptor, len(CANARY), 0, 0),
            )
    finally:
        os.close(descriptor)
    refused(tally, "exec of a file without an x bit", {errno.EACCES}, lambda: os.execv(file, [str(file)]))
    with tally.check("nothing new appeared"):
        require_equal(new.exists(), False, str(new))


def check_names(root: Path, file: Path, tally: Tally) -> None:
    absent = {errno.ENOENT}
    refused(tally, "open of a name that is not there", absent, opened(root / "not-there", os.O_RDONLY))
    refused(tally, "stat below a name that is not there", absent, lambda: os.stat(root / "no" / "such"))
    refused(tally, "stat below a file", {errno.ENOTDIR}, lambda: os.stat(file / "x"))
    refused(tally, "opendir of a file", {errno.ENOTDIR}, lambda: os.listdir(file))
    refused(tally, "a component of 256 bytes", {errno.ENAMETOOLONG}, lambda: os.stat(root / ("n" * 256)))
    refused(tally, "a path of 5000 bytes", {errno.ENAMETOOLONG}, lambda: os.stat(str(root) + "/n" * 2500))
    refused(tally, "a component of 255 bytes that is not there", absent, lambda: os.stat(root / ("n" * 255)))
    refused(tally, "bytes that are not UTF-8", absent | {errno.EILSEQ}, lambda: os.stat(bytes(root) + b"/\xff\xfe"))
    refused(tally, "readlink of a file", {errno.EINVAL}, lambda: os.readlink(file))
    refused(
        tally, "an attribute that is not there", {errno.ENODATA, errno.EOPNOTSUPP}, lambda: os.getxattr(file, "user.q")
    )
    with tally.check("names differ by case"):
        other = file.with_name(file.name.swapcase())
        require_equal(other.exists(), other.name == file.name or other.name in os.listdir(file.parent), str(other))
    with tally.check("'.' and '..' lead where they should"):
        folder = file.parent
        require_equal(os.stat(folder / ".").st_ino, os.stat(folder).st_ino, ". is the directory")
        require_equal(os.stat(folder / ".." / folder.name).st_ino, os.stat(folder).st_ino, ".. and back")
        require_equal(os.stat(folder / ".." / folder.name / file.name).st_ino, os.stat(file).st_ino, "through ..")


def check_directories(root: Path, file: Path, tally: Tally) -> None:
    with tally.check("readdir is stable, complete and without repeats") as step:
        for folder, folders, files in os.walk(root):
            listings = [os.listdir(folder) for _ in range(3)]
            require_equal(listings[1:], listings[:1] * 2, f"three listings of {folder}")
            require_equal(len(set(listings[0])), len(listings[0]), f"names of {folder} without repeats")
            require_equal(sorted(folders + files), sorted(listings[0]), f"walk and listing of {folder}")
            for entry in os.scandir(folder):
                info = entry.stat(follow_symlinks=False)
                require_equal(entry.inode(), info.st_ino, f"inode number of {entry.path} in readdir and stat")
                require_equal(entry.is_dir(follow_symlinks=False), stat.S_ISDIR(info.st_mode), f"kind of {entry.path}")
            step.note = f"last of {len(listings[0])} names"
    with tally.check("two readers of one directory do not disturb each other"):
        with os.scandir(file.parent) as a, os.scandir(file.parent) as b:
            first = next(a).name
            whole = [entry.name for entry in b]
            require_equal([first] + [entry.name for entry in a], whole, "listing")
    with tally.check("stat: kind, size, links, no write bits, the same every time"):
        info = os.stat(file)
        require_equal(stat.S_ISREG(info.st_mode), True, "a regular file")
        require_equal(stat.S_IMODE(info.st_mode) & 0o7222, 0, "write, setuid, setgid and sticky bits")
        require_equal(info.st_nlink >= 1, True, "links")
        require_equal(0 < info.st_blksize <= 1 << 24, True, f"block size {info.st_blksize}")
        require_equal(os.stat(file), os.stat(file), "two stats")
        with file.open("rb") as opened_file:
            require_equal(os.fstat(opened_file.fileno()).st_ino, info.st_ino, "inode number of stat and fstat")
            require_equal(os.fstat(opened_file.fileno()).st_size, info.st_size, "size of stat and fstat")
    with tally.check("statvfs: read-only, names up to 255 bytes"):
        filesystem = os.statvfs(file)
        require_equal(bool(filesystem.f_flag & os.ST_RDONLY), True, "ST_RDONLY")
        require_equal(filesystem.f_namemax >= 255, True, f"f_namemax {filesystem.f_namemax}")
    with tally.check("fsync and fdatasync of a descriptor opened for reading"):
        with file.open("rb") as opened_file:
            os.fsync(opened_file.fileno())
            os.fdatasync(opened_file.fileno())


def check_reads(file: Path, tally: Tally) -> None:
    size = file.stat().st_size
    with file.open("rb") as whole:
        content = whole.read()
    descriptor = os.open(file, os.O_RDONLY)
    try:
        with tally.check("the size is what a read to the end gives"):
            require_equal(len(content), size, "bytes")
        with tally.check("read at, after and far after the end"):
            for at in (size, size + 1, size + 4096, 1 << 40, (1 << 63) - (1 << 21)):
                require_equal(os.pread(descriptor, 4096, at), b"", f"read at {at}")
        with tally.check("read of nothing"):
            for at in (0, size // 2, size, size + 1):
                require_equal(os.pread(descriptor, 0, at), b"", f"read of 0 bytes at {at}")
        with tally.check("read across the end is as short as it must be, and no shorter"):
            for left in (1, 2, 511, 4095, 4096, 4097, 65535, 65536, 65537):
                if left <= size:
                    require_equal(
                        os.pread(descriptor, left + 70000, size - left), content[size - left :], f"last {left}"
                    )
        with tally.check("read across every multiple of 4 KiB, 64 KiB, 1 MiB and 8 MiB") as step:
            for unit in (1 << 12, 1 << 16, 1 << 20, 1 << 23):
                edges = range(unit, size, unit)
                for edge in edges if len(edges) < 64 else random.Random(unit).sample(edges, 64):
                    for before, length in ((1, 2), (17, 1000), (unit // 2, unit)):
                        at = edge - before
                        require_equal(
                            os.pread(descriptor, length, at) == content[at : at + length], True, f"{length} at {at}"
                        )
                        step.bytes_read += length
        with tally.check("read moves the position, pread does not, lseek finds it"):
            require_equal(os.lseek(descriptor, 0, os.SEEK_SET), 0, "start")
            os.read(descriptor, 10)
            os.pread(descriptor, 10, size // 2)
            require_equal(os.lseek(descriptor, 0, os.SEEK_CUR), min(10, size), "position after read and pread")
            require_equal(os.lseek(descriptor, 0, os.SEEK_END), size, "end")
            require_equal(os.lseek(descriptor, 5, os.SEEK_END), size + 5, "past the end")
            require_equal(os.read(descriptor, 10), b"", "read past the end")
            require_equal(os.lseek(descriptor, -1, os.SEEK_END), size - 1, "last byte")
            require_equal(os.read(descriptor, 10), content[-1:], "last byte")
        refused(tally, "lseek before the start", {errno.EINVAL}, lambda: os.lseek(descriptor, -1, os.SEEK_SET))
        with tally.check("SEEK_DATA and SEEK_HOLE: no holes but the end"):
            require_equal(os.lseek(descriptor, 0, os.SEEK_DATA), 0, "first data")
            require_equal(os.lseek(descriptor, 0, os.SEEK_HOLE), size, "first hole")
        refused(tally, "SEEK_DATA at the end", {errno.ENXIO}, lambda: os.lseek(descriptor, size, os.SEEK_DATA))
        with tally.check("readv and preadv fill buffers in order"):
            buffers = [bytearray(n) for n in (1, 4096, 0, 100_000, 7)]
            count = os.preadv(descriptor, buffers, 3)
            require_equal(b"".join(buffers)[:count] == content[3 : 3 + count], True, "preadv")
            require_equal(count, min(sum(map(len, buffers)), size - 3), "bytes of preadv")
            os.lseek(descriptor, 5, os.SEEK_SET)
            count = os.readv(descriptor, buffers)
            require_equal(b"".join(buffers)[:count] == content[5 : 5 + count], True, "readv")
        with tally.check("sendfile and splice into a pipe"):
            require_equal(
                _through_pipe(lambda w: os.sendfile(w, descriptor, 11, 4096)), content[11 : 11 + 4096], "sendfile"
            )
            require_equal(
                _through_pipe(lambda w: os.splice(descriptor, w, 4096, offset_src=13)),
                content[13 : 13 + 4096],
                "splice",
            )
        with tally.check("copy_file_range out of the mount, or a clean refusal") as step:
            with tempfile.TemporaryFile() as out:
                try:
                    count = os.copy_file_range(descriptor, out.fileno(), 100_000, 9, 0)
                except OSError as error:
                    # Between filesystems of different types the kernel may refuse; cp then reads and writes.
                    require_equal(
                        error.errno in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP), True, _name(error.errno)
                    )
                    step.note = _name(error.errno)
                else:
                    require_equal(os.pread(out.fileno(), count, 0) == content[9 : 9 + count], True, "content")
        with tally.check("private writable map changes nothing on the mount"):
            with mmap.mmap(
                descriptor, min(size, 1 << 20), mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE
            ) as private:
                require_equal(private[:] == content[: len(private)], True, "content")
                private[0] ^= 0xFF
            require_equal(os.pread(descriptor, 1, 0), content[:1], "first byte")
        with tally.check("a map outlives its descriptor; past the end its last page is zeros"):
            other = os.open(file, os.O_RDONLY)
            with mmap.mmap(other, 0, mmap.MAP_SHARED, mmap.PROT_READ) as shared:
                os.close(other)
                require_equal(shared[size - 1 : size], content[-1:], "last byte")
            address = LIBC.mmap
            address.restype = ctypes.c_void_p
            rounded = (size + 4095) & ~4095
            start = address(
                None, ctypes.c_size_t(rounded), mmap.PROT_READ, mmap.MAP_SHARED, descriptor, ctypes.c_long(0)
            )
            tail = ctypes.string_at(start + size, rounded - size)
            LIBC.munmap(ctypes.c_void_p(start), ctypes.c_size_t(rounded))
            require_equal(tail, bytes(rounded - size), "bytes after the end")
        with tally.check("advice is taken or ignored, never an error"):
            for advice in (
                os.POSIX_FADV_SEQUENTIAL,
                os.POSIX_FADV_RANDOM,
                os.POSIX_FADV_WILLNEED,
                os.POSIX_FADV_DONTNEED,
            ):
                os.posix_fadvise(descriptor, 0, size, advice)
        with tally.check("flock for reading, and a lease, do not hang"):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        with tally.check("a descriptor from O_PATH opens through /proc/self/fd"):
            path_only = os.open(file, os.O_PATH)
            try:
                with open(f"/proc/self/fd/{path_only}", "rb") as again:
                    require_equal(again.read(64), content[:64], "first bytes")
            finally:
                os.close(path_only)
    finally:
        os.close(descriptor)


def _through_pipe(send: Callable[[int], int]) -> bytes:
    reader, writer = os.pipe()
    try:
        count = send(writer)
        return os.read(reader, count) if count else b""
    finally:
        os.close(reader)
        os.close(writer)


def prove_it_can_fail() -> int:
    """On a writable directory the calls succeed, so most refusals must be reported as failed."""
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="modelfs-self-test-") as scratch:
        file = Path(scratch, "root", "model", "weights")
        file.parent.mkdir(parents=True)
        file.write_bytes(random.Random(1).randbytes(100_000))
        # The file is really renamed and removed, which ends the half that must find it.
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.suppress(FileNotFoundError):
            check_refusals(file.parent, file, tally)
    print("".join(f"  | {line}\n" for line in out.getvalue().splitlines()), end="")
    noticed = tally.failed >= 10
    print(f"self-test {'passed' if noticed else 'FAILED'}: {tally.failed} refusals were missed where all is writable")
    return 0 if noticed else 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mount", type=Path, nargs="?", help="a folder with files on the mount, not its root")
    parser.add_argument("--file", type=Path, help="the file to read; default the largest below 256 MiB")
    parser.add_argument("--self-test", action="store_true", help="prove on a writable folder that the suite can fail")
    args = parser.parse_args()
    if args.self_test:
        sys.exit(prove_it_can_fail())
    if args.mount is None:
        parser.error("MOUNT is required without --self-test")
    files = [p for p in args.mount.rglob("*") if p.is_file() and 0 < p.stat().st_size < 256 << 20]
    if not files and args.file is None:
        sys.exit(f"readonly_suite: no file to read below {args.mount}")
    file = args.file or max(files, key=lambda p: p.stat().st_size)
    before = {p: p.lstat() for p in sorted(args.mount.rglob("*"))}

    tally = Tally()
    check_reads(file, tally)
    check_names(args.mount, file, tally)
    check_directories(args.mount, file, tally)
    check_refusals(args.mount, file, tally)
    with tally.check("the tree is what it was"):
        after = {p: p.lstat() for p in sorted(args.mount.rglob("*"))}
        require_equal([str(p) for p in after], [str(p) for p in before], "names")
        for path, info in before.items():
            require_equal((after[path].st_size, after[path].st_mode), (info.st_size, info.st_mode), str(path))
    print(f"readonly_suite: {tally.passed} passed, {tally.failed} failed")
    sys.exit(1 if tally.failed else 0)


if __name__ == "__main__":
    main()

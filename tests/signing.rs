//! Who may publish and who may move a channel, at the command line: cosigners, release keys, thresholds of a trust file.
//!
//! THREAT_MODEL (b) rows 11 and 12.

#[path = "common/program.rs"]
mod program;

use std::path::{Path, PathBuf};
use std::process::Output;

use program::{Program, can_mount, run_ok};
use serde_json::Value;

struct Site {
    folder: tempfile::TempDir,
    program: Program,
}

impl Site {
    /// A model folder `src`, and signing pairs `a`, `b` and so on.
    fn new(pairs: &[&str]) -> Site {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let program = Program::in_folder(folder.path());
        for pair in pairs {
            run_ok(&mut program.command(&["keygen", "--signing", pair]));
        }
        let site = Site { folder, program };
        std::fs::create_dir(site.path("src")).expect("mkdir");
        site.write("src/config.json", "{}");
        site.write("src/weights", &"w".repeat(100_000));
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).expect("written");
    }

    fn public(&self, pair: &str) -> String {
        let text = std::fs::read_to_string(self.path(&format!("{pair}.pub"))).expect("a public half");
        text.trim().to_owned()
    }

    /// A trust file of lines in which `{a}` stands for the public key of pair `a`.
    fn trust(&self, name: &str, text: &str) {
        let mut text = text.to_owned();
        for pair in ["a", "b", "c", "d", "p", "r", "s", "t"] {
            if text.contains(&format!("{{{pair}}}")) {
                text = text.replace(&format!("{{{pair}}}"), &self.public(pair));
            }
        }
        self.write(name, &text);
    }

    fn run(&self, words: &str) -> Output {
        self.run_as("home/state", words)
    }

    /// As somebody who remembers what `state` says.
    fn run_as(&self, state: &str, words: &str) -> Output {
        let words: Vec<&str> = words.split(' ').collect();
        let mut command = self.program.command(&words);
        command.env("MODELFS_STATE_DIR", self.path(state)).output().expect("the program starts")
    }

    #[track_caller]
    fn ok(&self, words: &str) -> Value {
        let done = self.run(words);
        assert!(done.status.success(), "{words}: {}", String::from_utf8_lossy(&done.stderr));
        serde_json::from_slice(&done.stdout).unwrap_or(Value::Null)
    }

    #[track_caller]
    fn refused(&self, words: &str, exit: i32, with: &str) {
        refused(self.run(words), words, exit, with);
    }
}

#[track_caller]
fn refused(done: Output, words: &str, exit: i32, with: &str) {
    let err = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(exit), "{words}: {err}");
    assert!(err.contains(with), "{words}: wanted {with} in {err}");
}

/// Row 12: one key of three, stolen or in a hurry, publishes nothing that readers take.
#[test]
fn two_of_three_publishers_make_a_version_readable_and_one_does_not() {
    let site = Site::new(&["a", "b", "c", "d", "r"]);
    site.trust(
        "trust",
        "acme/* {a} publisher\nacme/* {b} publisher\nacme/* {c} publisher\nacme/* {r} release\nthreshold acme/* 2\n",
    );
    let key = site.program.key();
    let seal = format!("seal src store acme/m --key {key} --release r --trust-file trust --json --sign");
    let sealed = site.ok(&format!("{seal} a"));
    let warned = sealed["warnings"].to_string();
    assert!(warned.contains("1 of the 2 publishers") && warned.contains("modelfs sign store acme/m@1"), "{warned}");

    let cat = format!("cat store acme/m config.json --key {key} --trust-file trust");
    site.refused(&cat, 20, "MAN_SIG");
    site.refused(&format!("mount store mnt --model acme/m --key {key} --trust-file trust"), 20, "MAN_SIG");

    // A key that is not among the three signs in vain.
    let sign = "sign store acme/m@1 --trust-file trust --json --sign";
    assert_eq!(site.ok(&format!("{sign} d"))["publishers"], 1);
    site.refused(&cat, 20, "MAN_SIG");
    // The first one signs again: still one.
    let again = site.ok(&format!("{sign} a"));
    assert_eq!((&again["publishers"], &again["signed"][0]["already"]), (&1.into(), &true.into()));
    site.refused(&cat, 20, "MAN_SIG");

    let signed = site.ok(&format!("{sign} b --key {key}"));
    assert_eq!((&signed["publishers"], &signed["publishers_wanted"]), (&2.into(), &2.into()));
    assert_eq!(signed["signed"][0]["already"], false);
    assert_eq!(site.ok(&format!("{sign} b"))["signed"][0]["already"], true);
    site.ok(&cat);
    if can_mount() {
        // The program's own key, which its mounts trust, is one of the three here.
        std::fs::create_dir_all(site.path("home/.config/modelfs")).expect("mkdir");
        std::fs::copy(site.path("a.pub"), site.program.trusted_key()).expect("copied");
        let mount = site.program.mount(&["--trust-file", "trust"]);
        let read = std::fs::read(site.program.mountpoint().join("acme/m/config.json"));
        assert_eq!(read.expect("served"), b"{}");
        mount.unmount();
    }

    // Two at once need no second step; a key given twice is one key.
    assert_eq!(site.ok(&format!("{seal} c --sign b"))["warnings"], serde_json::json!([]));
    site.ok(&cat);
    site.refused(&format!("{seal} c --sign c"), 2, "one key counts once");
}

#[test]
fn a_signature_is_added_only_to_a_version_that_a_trusted_publisher_signed() {
    let site = Site::new(&["a", "b"]);
    let key = site.program.key();
    site.ok(&format!("seal src store acme/m --key {key} --sign a --json"));
    site.trust("only-b", "* {b}\n");
    site.trust("ours", "* {a}\n* {b} publisher\n");
    site.refused("sign store acme/m@1 --sign b --trust-file only-b", 20, "REF_KEY");
    site.refused("sign store acme/m@1 --sign b", 2, "NO_TRUST");
    // A tag may move between the look and the signature.
    for moving in ["acme/m", "acme/m@latest"] {
        site.refused(&format!("sign store {moving} --sign b --trust-file ours"), 2, "acme/m@7");
    }
    site.refused("sign store acme/m@2 --sign b --trust-file ours", 3, "version 2");
    site.refused("sign store acme/m@1 --sign none --trust-file ours", 2, "--sign none");
    // What lies there under our name and is not ours is neither believed nor replaced.
    let inspected = site.ok(&format!("inspect store acme/m --key {key} --trust-file ours --json"));
    let digest = inspected["manifest"].as_str().expect("a digest").trim_start_matches("sha256:").to_owned();
    site.ok("sign store acme/m@1 --sign b --trust-file ours");
    let name = find(&site.path("store"), &digest, &id(&site.public("b"))).expect("a signature of b");
    let mut bytes = std::fs::read(&name).expect("read");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::remove_file(&name).expect("removed");
    std::fs::write(&name, &bytes).expect("spoiled");
    site.refused("sign store acme/m@1 --sign b --trust-file ours", 20, "delete it, then sign again");
}

fn id(public: &str) -> String {
    let bytes: [u8; 32] = hex::decode(public).expect("hex").try_into().expect("32 bytes");
    modelfs::crypto::PublicKey::from_bytes(bytes).expect("a key").key_id().to_string()
}

/// The file below `dir` whose path has both words in it.
fn find(dir: &Path, one: &str, two: &str) -> Option<PathBuf> {
    std::fs::read_dir(dir).expect("listed").filter_map(|entry| Some(entry.ok()?.path())).find_map(|path| {
        let text = path.to_string_lossy().into_owned();
        if path.is_dir() { find(&path, one, two) } else { (text.contains(one) && text.contains(two)).then_some(path) }
    })
}

/// Row 11: the key that moves channels makes no version, neither alone nor with a publisher nobody trusts; and what it
/// has spoiled the publisher repairs without inheriting from it.
#[test]
fn a_stolen_release_key_moves_only_among_what_publishers_signed() {
    let site = Site::new(&["p", "r", "t"]);
    site.trust("trust", "acme/* {p} publisher\nacme/* {r} release\n");
    let key = site.program.key();
    let cat = format!("cat store acme/m config.json --key {key} --trust-file trust");
    let seal = format!("seal src store acme/m --key {key} --trust-file trust --json --release r --sign");
    site.ok(&format!("{seal} p"));
    site.ok(&cat);

    // The thief even holds the model's key. Its own machine remembers nothing.
    site.write("src/config.json", "evil");
    for publisher in ["t", "r"] {
        let words =
            format!("seal src store acme/m --key {key} --release r --sign {publisher} --trust {}", site.public("r"));
        let done = site.run_as("thief", &words);
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        site.refused(&cat, 20, "MAN_SIG");
    }

    site.write("src/config.json", "good");
    let repaired = site.ok(&format!("{seal} p"));
    assert_eq!(repaired["version"], 4);
    assert_eq!(repaired["inherited_bytes"], 0, "{repaired}");
    assert!(repaired["warnings"].to_string().contains("cannot be inherited from"), "{repaired}");
    let read = site.run(&cat);
    assert_eq!(read.stdout, b"good");
}

/// A ref is signed once, by all its release keys: one with too few would close the channel to every reader.
#[test]
fn a_seal_that_too_few_release_keys_sign_publishes_nothing() {
    let site = Site::new(&["p", "r", "s"]);
    site.trust("trust", "* {p} publisher\n* {r} release\n* {s} release\nthreshold * 2 release\n");
    let key = site.program.key();
    let seal = format!("seal src store acme/m --key {key} --trust-file trust --sign p --json --release r");
    site.refused(&seal, 2, "asks for 2 release keys, 1 of them sign");
    assert_eq!(std::fs::read_dir(site.path("store")).expect("listed").count(), 0);
    site.ok(&format!("{seal} --release s"));
    let cat = format!("cat store acme/m config.json --key {key} --trust-file trust");
    site.ok(&cat);
    // Without the policy one release key is enough to write a ref, and readers who have it refuse that ref.
    let words = format!("seal src store acme/m --key {key} --trust {} --sign p --release r", site.public("r"));
    assert!(site.run_as("elsewhere", &words).status.success());
    site.refused(&cat, 20, "REF_KEY");
}

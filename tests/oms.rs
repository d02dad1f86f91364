//! OpenSSF model signing, against the reference implementation (the `oms` part): what it signs is accepted, what is
//! tampered with is refused by both, and where we refuse more than it does the table says why.
//!
//! THREAT_MODEL (f) row 76.

#[path = "common/mod.rs"]
mod common;
#[path = "common/program.rs"]
mod program;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use aws_lc_rs::encoding::{AsDer, PublicKeyX509Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, ECDSA_P521_SHA512_ASN1_SIGNING, EcdsaKeyPair,
    EcdsaSigningAlgorithm, KeyPair,
};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use program::{Program, can_mount, run_ok};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// A model folder, a signing key in PEM, and both programs.
struct Bench {
    folder: tempfile::TempDir,
    program: Program,
    python: PathBuf,
    pair: EcdsaKeyPair,
}

fn pem(path: &Path, kind: &str, der: &[u8]) {
    let base64 = STANDARD.encode(der);
    let lines: Vec<&str> = base64.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).expect("ASCII")).collect();
    let text = format!("-----BEGIN {kind}-----\n{}\n-----END {kind}-----\n", lines.join("\n"));
    std::fs::write(path, text).expect("written");
}

impl Bench {
    /// `None` after saying that the part is missing.
    fn new(algorithm: &'static EcdsaSigningAlgorithm) -> Option<Bench> {
        common::part("oms/complete")?;
        let folder = tempfile::tempdir().expect("a temporary folder");
        let program = Program::in_folder(folder.path());
        let pair = EcdsaKeyPair::generate(algorithm).expect("a new key");
        let secret = pair.to_pkcs8v1().expect("encoded");
        let public: PublicKeyX509Der<'_> = pair.public_key().as_der().expect("encoded");
        pem(&folder.path().join("key.pem"), "PRIVATE KEY", secret.as_ref());
        pem(&folder.path().join("pub.pem"), "PUBLIC KEY", public.as_ref());
        let bench = Bench { python: common::parts_dir().join("oms/bin/python"), folder, program, pair };
        bench.fill(&bench.model());
        Some(bench)
    }

    fn model(&self) -> PathBuf {
        self.folder.path().join("m")
    }

    fn fill(&self, model: &Path) {
        std::fs::create_dir_all(model.join("sub/deep")).expect("mkdir");
        for (name, bytes) in [
            ("config.json", b"{\"a\": 1}".to_vec()),
            ("weights-00001.bin", vec![7; 250_000]),
            ("sub/deep/r\u{e9}sum\u{e9} 1.txt", b"text".to_vec()),
            ("sub/b", vec![9; 3]),
        ] {
            std::fs::write(model.join(name), bytes).expect("written");
        }
    }

    fn reference(&self, words: &[&str]) -> Output {
        let mut command = Command::new(&self.python);
        command.args(["-m", "model_signing"]).args(words).current_dir(self.folder.path());
        command.output().expect("the reference starts")
    }

    /// Signed in place, as its documentation does it.
    fn sign(&self, more: &[&str]) {
        let words = [&["sign", "key", "m", "--signature", "m/model.sig", "--private_key", "key.pem"], more].concat();
        let done = self.reference(&words);
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }

    /// In shards of 100,000 bytes, which only the reference's library can.
    fn sign_shards(&self) {
        let script = "import model_signing.signing as s, model_signing.hashing as h, pathlib\n\
                      c = h.Config().use_shard_serialization(shard_size=100000)\n\
                      c.set_ignored_paths(paths=['model.sig'])\n\
                      s.Config().use_elliptic_key_signer(private_key='key.pem').set_hashing_config(c)\\\n\
                      .sign('m', 'm/model.sig')\n";
        let mut command = Command::new(&self.python);
        run_ok(command.args(["-c", script]).current_dir(self.folder.path()));
    }

    /// In shards: only its library can, and only when it is told how long a shard is.
    fn reference_accepts_shards(&self) -> bool {
        let script = "import model_signing.verifying as v, model_signing.hashing as h\n\
                      c = h.Config().use_shard_serialization(shard_size=100000)\n\
                      v.Config().use_elliptic_key_verifier(public_key='pub.pem').set_hashing_config(c)\\\n\
                      .verify('m', 'm/model.sig')\n\
                      print('accepted')\n";
        let mut command = Command::new(&self.python);
        let done = command.args(["-c", script]).current_dir(self.folder.path()).output().expect("the reference starts");
        done.status.success() && said(&done).contains("accepted")
    }

    fn reference_accepts(&self, model: &str) -> bool {
        let signature = format!("{model}/model.sig");
        let done = self.reference(&["verify", "key", model, "--signature", &signature, "--public_key", "pub.pem"]);
        let text = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.success(), text.contains("Verification succeeded"), "{text}");
        done.status.success()
    }

    fn ours(&self, words: &[&str]) -> Output {
        self.program.command(words).output().expect("the program starts")
    }

    /// Seals with the check; into a store of its own, so that nothing is inherited.
    fn seal_checked(&self, store: &str) -> Output {
        let key = self.program.key();
        self.ours(&["seal", "m", store, "acme/m", "--key", &key, "--oms-key", "pub.pem", "--json"])
    }

    /// Seals without the check, then verifies with it.
    fn verify_sealed(&self, store: &str) -> Output {
        let key = self.program.key();
        run_ok(&mut self.program.command(&["seal", "m", store, "acme/m", "--key", &key]));
        let trust = self.program.trusted_key();
        let trust = trust.to_str().expect("UTF-8");
        self.ours(&[
            "verify",
            store,
            "acme/m",
            "--key",
            &key,
            "--trust",
            trust,
            "--oms",
            "--oms-key",
            "pub.pem",
            "--json",
        ])
    }

    fn bundle(&self) -> Value {
        serde_json::from_slice(&std::fs::read(self.model().join("model.sig")).expect("read")).expect("JSON")
    }

    fn write_bundle(&self, bundle: &Value) {
        std::fs::write(self.model().join("model.sig"), bundle.to_string()).expect("written");
    }

    fn statement(bundle: &Value) -> Value {
        let payload = bundle["dsseEnvelope"]["payload"].as_str().expect("a payload");
        serde_json::from_slice(&STANDARD.decode(payload).expect("base64")).expect("JSON")
    }

    /// The same bundle with another statement, and the signature of the genuine key over it.
    fn resigned(&self, mut bundle: Value, payload: &[u8]) -> Value {
        let kind = "application/vnd.in-toto+json";
        let mut message = format!("DSSEv1 {} {kind} {} ", kind.len(), payload.len()).into_bytes();
        message.extend_from_slice(payload);
        let signature = self.pair.sign(&SystemRandom::new(), &message).expect("signed");
        bundle["dsseEnvelope"]["payload"] = STANDARD.encode(payload).into();
        bundle["dsseEnvelope"]["signatures"][0]["sig"] = STANDARD.encode(signature.as_ref()).into();
        bundle
    }
}

/// After an edit of the resources: the subject that fits them.
fn reroot(statement: &mut Value) {
    let mut hasher = Sha256::new();
    for resource in statement["predicate"]["resources"].as_array().expect("resources") {
        hasher.update(hex::decode(resource["digest"].as_str().expect("hex")).unwrap_or_default());
    }
    statement["subject"][0]["digest"]["sha256"] = hex::encode(hasher.finalize()).into();
}

fn said(done: &Output) -> String {
    String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr)
}

#[test]
fn row_76_what_the_reference_signs_is_accepted_and_mounts_as_it_was_signed() {
    for (name, algorithm) in [
        ("P-256", &ECDSA_P256_SHA256_ASN1_SIGNING),
        ("P-384", &ECDSA_P384_SHA384_ASN1_SIGNING),
        ("P-521", &ECDSA_P521_SHA512_ASN1_SIGNING),
    ] {
        let Some(bench) = Bench::new(algorithm) else { return };
        std::fs::write(bench.model().join("empty"), "").expect("written");
        for shards in [false, true] {
            let store = format!("store-{shards}");
            if shards {
                bench.sign_shards()
            } else {
                bench.sign(&[])
            }
            let accepted = if shards { bench.reference_accepts_shards() } else { bench.reference_accepts("m") };
            assert!(accepted, "{name}, shards: {shards}");
            let sealed = bench.seal_checked(&store);
            assert!(sealed.status.success(), "{name}: {}", said(&sealed));
            let sealed: Value = serde_json::from_slice(&sealed.stdout).expect("JSON");
            assert_eq!(sealed["oms"]["files"], if shards { 4 } else { 5 }, "{sealed}");
            assert!(sealed["oms"]["signer"].as_str().expect("a signer").starts_with(name), "{sealed}");
            let verified = bench.verify_sealed(&format!("{store}-v"));
            assert!(verified.status.success(), "{name}: {}", said(&verified));
        }
        if name == "P-256" && can_mount() {
            // Its command reads no shards.
            bench.sign(&[]);
            let key = bench.program.key();
            let sealed = ["seal", "m", "store", "acme/m", "--key", &key, "--oms-key", "pub.pem"];
            run_ok(&mut bench.program.command(&sealed));
            let mount = bench.program.mount(&[]);
            let model = bench.program.mountpoint().join("acme/m");
            assert!(bench.reference_accepts(model.to_str().expect("UTF-8")));
            mount.unmount();
        }
    }
}

/// The reference leaves git's files out of every signature: so do we, and say which; the manifest still covers them.
#[test]
fn row_76_files_that_the_signer_left_out_are_named() {
    let Some(bench) = Bench::new(&ECDSA_P256_SHA256_ASN1_SIGNING) else { return };
    std::fs::create_dir(bench.model().join("notes")).expect("mkdir");
    std::fs::write(bench.model().join("notes/todo"), "later").expect("written");
    bench.sign(&["--ignore-paths", "m/notes"]);
    std::fs::write(bench.model().join(".gitattributes"), "* filter=evil").expect("written");
    std::fs::write(bench.model().join("notes/more"), "later").expect("written");
    assert!(bench.reference_accepts("m"));
    let sealed = bench.seal_checked("store");
    assert!(sealed.status.success(), "{}", said(&sealed));
    let value: Value = serde_json::from_slice(&sealed.stdout).expect("JSON");
    assert_eq!(value["oms"]["unsigned"], json!([".gitattributes", "notes/more", "notes/todo"]));
    assert_eq!(value["files"], 8, "{value}");
}

enum Edit {
    /// Of the bundle, unsigned.
    Bundle(fn(&mut Value)),
    /// Of the statement; the genuine key signs what comes of it.
    Statement(fn(&mut Value)),
    /// Of the statement's text, likewise.
    Text(fn(String) -> String),
    /// Of the model folder.
    Tree(fn(&Path)),
}

/// What the reference does with the edit.
#[derive(PartialEq)]
enum Reference {
    Refuses,
    /// And why we do not.
    Accepts(&'static str),
}

use Edit::{Bundle, Statement, Text, Tree};
use Reference::{Accepts, Refuses};

/// What is tampered with, how, a part of what we say, and what the reference does.
type Case = (&'static str, Edit, &'static str, Reference);

const OF_FILES: &[Case] = &[
    // The bundle.
    ("media type", Bundle(|b| b["mediaType"] = "application/json".into()), "media type", Refuses),
    ("payload type", Bundle(|b| b["dsseEnvelope"]["payloadType"] = "text/plain".into()), "text/plain", Refuses),
    ("no signature", Bundle(|b| b["dsseEnvelope"]["signatures"] = json!([])), "0 signatures", Refuses),
    (
        "two signatures",
        Bundle(|b| {
            let one = b["dsseEnvelope"]["signatures"][0].clone();
            b["dsseEnvelope"]["signatures"] = json!([one, one]);
        }),
        "2 signatures",
        Accepts("it looks at the first only: a second signer would be believed unseen"),
    ),
    (
        "signature of another message",
        Bundle(|b| b["dsseEnvelope"]["signatures"][0]["sig"] = STANDARD.encode([0x30, 0x06, 2, 1, 1, 2, 1, 1]).into()),
        "does not verify",
        Refuses,
    ),
    (
        "payload with one byte changed",
        Bundle(|b| {
            let text = b["dsseEnvelope"]["payload"].as_str().expect("text").replacen('I', "J", 1);
            b["dsseEnvelope"]["payload"] = text.into();
        }),
        "does not verify",
        Refuses,
    ),
    ("payload that is no base64", Bundle(|b| b["dsseEnvelope"]["payload"] = "%%%".into()), "not base64", Refuses),
    (
        "no envelope",
        Bundle(|b| {
            b.as_object_mut().expect("object").remove("dsseEnvelope");
        }),
        "no DSSE envelope",
        Refuses,
    ),
    (
        "hint at another key",
        Bundle(|b| b["verificationMaterial"]["publicKey"]["hint"] = "00".repeat(32).into()),
        "another key",
        Refuses,
    ),
    ("no verification material", Bundle(|b| b["verificationMaterial"] = json!({})), "does not say that a key", Refuses),
    (
        "keyless without a log",
        Bundle(|b| b["verificationMaterial"] = json!({"certificate": {"rawBytes": "AAAA"}, "tlogEntries": []})),
        "missing tlog",
        Refuses,
    ),
    (
        "keyless with a log",
        Bundle(|b| b["verificationMaterial"] = json!({"certificate": {"rawBytes": "AAAA"}, "tlogEntries": [{}]})),
        "model_signing verify sigstore",
        Refuses,
    ),
    (
        "a certificate chain",
        Bundle(|b| {
            b["verificationMaterial"] = json!({"x509CertificateChain": {"certificates": [{"rawBytes": "AAAA"}]}})
        }),
        "certificate",
        Refuses,
    ),
    // The statement, signed by the genuine key: what a signer of another tool, or of another purpose, may produce.
    ("statement type", Statement(|s| s["_type"] = "https://in-toto.io/Statement/v0.1".into()), "of type", Refuses),
    (
        "predicate type",
        Statement(|s| s["predicateType"] = "https://slsa.dev/provenance/v1".into()),
        "predicate",
        Refuses,
    ),
    (
        "predicate of before 1.0",
        Statement(|s| {
            s["predicateType"] = "https://model_signing/Digests/v0.1".into();
            let of = |r: &Value| json!({"name": r["name"], "digest": {"sha256": r["digest"]}});
            s["subject"] = s["predicate"]["resources"].as_array().expect("resources").iter().map(of).collect();
        }),
        "sign again with model_signing 1.0",
        Accepts("the old statement does not say what was left out"),
    ),
    ("no subject", Statement(|s| s["subject"] = json!([])), "0 subjects", Refuses),
    ("two subjects", Statement(|s| s["subject"] = json!([s["subject"][0], s["subject"][0]])), "2 subjects", Refuses),
    (
        "root digest",
        Statement(|s| s["subject"][0]["digest"]["sha256"] = "00".repeat(32).into()),
        "contradicts itself",
        Refuses,
    ),
    (
        "resource digest",
        Statement(|s| {
            s["predicate"]["resources"][0]["digest"] = "11".repeat(32).into();
            reroot(s);
        }),
        "config.json has SHA-256",
        Refuses,
    ),
    (
        "short digest",
        Statement(|s| {
            s["predicate"]["resources"][0]["digest"] = "11".into();
            reroot(s);
        }),
        "64 hex digits",
        Refuses,
    ),
    (
        "other algorithm",
        Statement(|s| s["predicate"]["resources"][0]["algorithm"] = "sha1".into()),
        "wanted sha256",
        Refuses,
    ),
    (
        "other hash type",
        Statement(|s| s["predicate"]["serialization"]["hash_type"] = "blake2".into()),
        "sign again",
        Accepts("its command hashes with sha256 whatever the signature says"),
    ),
    (
        "other method",
        Statement(|s| s["predicate"]["serialization"]["method"] = "tensors".into()),
        "files or shards",
        Refuses,
    ),
    (
        "a file listed that is not there",
        Statement(|s| {
            let mut ghost = s["predicate"]["resources"][0].clone();
            ghost["name"] = "ghost".into();
            s["predicate"]["resources"].as_array_mut().expect("resources").push(ghost);
            reroot(s);
        }),
        "ghost is signed, but not there",
        Refuses,
    ),
    (
        "a file listed twice",
        Statement(|s| {
            let again = s["predicate"]["resources"][0].clone();
            s["predicate"]["resources"].as_array_mut().expect("resources").push(again);
            reroot(s);
        }),
        "listed twice",
        Accepts("it keeps the last of the two; nobody knows which was meant"),
    ),
    (
        "a path that leads out",
        Statement(|s| {
            s["predicate"]["resources"][0]["name"] = "../config.json".into();
            reroot(s);
        }),
        "no path of a model",
        Refuses,
    ),
    (
        "a path written otherwise",
        Statement(|s| {
            s["predicate"]["resources"][0]["name"] = "./config.json".into();
            reroot(s);
        }),
        "no path of a model",
        Accepts("it normalises: two spellings of one file are two names for a signature"),
    ),
    (
        "everything left out",
        Statement(|s| {
            s["predicate"]["resources"] = json!([]);
            s["predicate"]["serialization"]["ignore_paths"] = json!(["."]);
            reroot(s);
        }),
        "which is everything",
        Accepts("it then vouches for nothing"),
    ),
    (
        "a field twice",
        Text(|text| text.replacen('{', "{\"predicateType\": \"https://model_signing/signature/v1.0\", ", 1)),
        "not the JSON it should be",
        Accepts("it takes the last of the two; other readers take the first"),
    ),
    ("no JSON", Text(|text| text[1..].to_owned()), "not the JSON it should be", Refuses),
    (
        "nested too deep",
        Text(|text| {
            text.replacen(
                "\"subject\":",
                &format!("\"x\": {}1{}, \"subject\":", "[".repeat(200_000), "]".repeat(200_000)),
                1,
            )
        }),
        "nested deeper",
        Refuses,
    ),
    // The folder.
    (
        "a byte of a file",
        Tree(|m| std::fs::write(m.join("config.json"), "{\"a\": 2}").expect("written")),
        "config.json has SHA-256",
        Refuses,
    ),
    (
        "a file more",
        Tree(|m| std::fs::write(m.join("sub/more.py"), "x").expect("written")),
        "sub/more.py is not signed",
        Refuses,
    ),
    (
        "a file less",
        Tree(|m| std::fs::remove_file(m.join("sub/b")).expect("removed")),
        "sub/b is signed, but not there",
        Refuses,
    ),
    (
        "a file under another name",
        Tree(|m| std::fs::rename(m.join("sub/b"), m.join("b")).expect("moved")),
        "b is not signed",
        Refuses,
    ),
    (
        "a file like git's",
        Tree(|m| std::fs::write(m.join(".gitattributes2"), "x").expect("written")),
        "not signed",
        Refuses,
    ),
];

#[test]
fn row_76_a_bundle_or_a_tree_that_was_tampered_with_is_refused_by_name() {
    let Some(bench) = Bench::new(&ECDSA_P256_SHA256_ASN1_SIGNING) else { return };
    bench.sign(&[]);
    let genuine = bench.bundle();
    assert!(bench.reference_accepts("m") && bench.seal_checked("genuine").status.success(), "the detector must fail");
    hostile(&bench, &genuine, OF_FILES);
}

const OF_SHARDS: &[Case] = &[
    (
        "digest of the second shard",
        Statement(|s| {
            shard(s, "weights-00001.bin:100000:200000")["digest"] = "11".repeat(32).into();
            reroot(s);
        }),
        "in the shard at 100000",
        Refuses,
    ),
    (
        "a gap",
        Statement(|s| {
            let resources = s["predicate"]["resources"].as_array_mut().expect("resources");
            resources.retain(|r| r["name"] != "weights-00001.bin:100000:200000");
            reroot(s);
        }),
        "not one after the other",
        Refuses,
    ),
    (
        "the last shard missing",
        Statement(|s| {
            let resources = s["predicate"]["resources"].as_array_mut().expect("resources");
            resources.retain(|r| r["name"] != "weights-00001.bin:200000:250000");
            reroot(s);
        }),
        "signed are 200000",
        Refuses,
    ),
    (
        "a name without a range",
        Statement(|s| {
            shard(s, "config.json:0:8")["name"] = "config.json".into();
            reroot(s);
        }),
        "no shard PATH:START:END",
        Refuses,
    ),
    (
        "shards of zero",
        Statement(|s| s["predicate"]["serialization"]["shard_size"] = 0.into()),
        "are none",
        Accepts("it believes what its caller says of the length, not the signature"),
    ),
    (
        "another length of shards",
        Statement(|s| s["predicate"]["serialization"]["shard_size"] = 50_000.into()),
        "wanted sha256-sharded-50000",
        Accepts("as above"),
    ),
    (
        "a byte of the last shard",
        Tree(|m| {
            let mut bytes = vec![7; 250_000];
            bytes[249_999] = 8;
            std::fs::write(m.join("weights-00001.bin"), bytes).expect("written");
        }),
        "in the shard at 200000",
        Refuses,
    ),
    (
        "a longer file",
        Tree(|m| std::fs::write(m.join("weights-00001.bin"), vec![7; 250_001]).expect("written")),
        "has 250001 bytes",
        Refuses,
    ),
];

#[test]
fn row_76_shards_that_were_tampered_with_are_refused_by_name() {
    let Some(bench) = Bench::new(&ECDSA_P256_SHA256_ASN1_SIGNING) else { return };
    bench.sign_shards();
    let genuine = bench.bundle();
    assert!(
        bench.reference_accepts_shards() && bench.seal_checked("genuine").status.success(),
        "the detector must fail"
    );
    hostile(&bench, &genuine, OF_SHARDS);
}

/// Whoever relies on the reference must be able to read where a bundle that it takes is refused here.
#[test]
fn what_the_reference_accepts_and_we_refuse_is_declared_case_by_case() {
    let page = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/KEYS.md")).expect("the page");
    let (_, section) = page.split_once("\n#### Stricter than the reference\n").expect("the section");
    let section = section.split("\n#").next().expect("its text");
    let rows = section.lines().filter_map(|line| line.strip_prefix("| ")?.split_once(" |")).map(|(case, _)| case);
    let mut declared: Vec<&str> = rows.filter(|case| *case != "the bundle has" && !case.starts_with("---")).collect();
    let accepted = |case: &&Case| matches!(case.3, Accepts(_));
    let mut found: Vec<&str> = OF_FILES.iter().chain(OF_SHARDS).filter(accepted).map(|case| case.0).collect();
    // Its other commands take these; the one that verifies a key refuses them as we do.
    found.extend(["a certificate chain", "keyless with a log"]);
    declared.sort_unstable();
    found.sort_unstable();
    assert_eq!(declared, found);
    for class in ["a certificate chain", "keyless with a log"] {
        assert!(OF_FILES.iter().any(|case| case.0 == class && matches!(case.3, Refuses)), "{class}");
    }
}

fn shard<'v>(statement: &'v mut Value, name: &str) -> &'v mut Value {
    let resources = statement["predicate"]["resources"].as_array_mut().expect("resources");
    resources.iter_mut().find(|resource| resource["name"] == name).expect("a shard of that name")
}

fn hostile(bench: &Bench, genuine: &Value, cases: &[Case]) {
    let mut wrong = Vec::new();
    for (number, (name, edit, with, reference)) in cases.iter().enumerate() {
        std::fs::remove_dir_all(bench.model()).expect("removed");
        bench.fill(&bench.model());
        let mut bundle = genuine.clone();
        match edit {
            Bundle(edit) => edit(&mut bundle),
            Statement(edit) => {
                let mut statement = Bench::statement(&bundle);
                edit(&mut statement);
                bundle = bench.resigned(bundle, statement.to_string().as_bytes());
            }
            Text(edit) => {
                let text = edit(Bench::statement(&bundle).to_string());
                bundle = bench.resigned(bundle, text.as_bytes());
            }
            Tree(edit) => edit(&bench.model()),
        }
        bench.write_bundle(&bundle);
        let shards = Bench::statement(genuine)["predicate"]["serialization"]["method"] == "shards";
        let accepts = if shards { bench.reference_accepts_shards() } else { bench.reference_accepts("m") };
        if accepts != matches!(reference, Accepts(_)) {
            wrong.push(format!("{name}: the reference {}", if accepts { "accepts" } else { "refuses" }));
        }
        let store = format!("store-{number}");
        for (what, done) in [("seal", bench.seal_checked(&store)), ("verify", bench.verify_sealed(&store))] {
            if done.status.code() != Some(20) || !said(&done).contains(with) || !said(&done).contains("OMS") {
                wrong.push(format!(
                    "{name}: {what} ended with {:?}, wanted `{with}`: {}",
                    done.status.code(),
                    said(&done)
                ));
            }
            if what == "seal"
                && std::fs::exists(bench.program.root().join(&store)).expect("a look")
                && walk(&bench.program.root().join(&store)).iter().any(|path| path.contains("/refs/"))
            {
                wrong.push(format!("{name}: a refused model was published"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn walk(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).expect("listed").flatten() {
        let path = entry.path();
        if path.is_dir() { found.extend(walk(&path)) } else { found.push(path.to_string_lossy().into_owned()) }
    }
    found
}

#[test]
fn a_bundle_needs_a_key_a_place_in_the_model_and_a_model_key_to_be_compared() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = Program::in_folder(folder.path());
    std::fs::create_dir(folder.path().join("m")).expect("mkdir");
    std::fs::write(folder.path().join("m/a"), "a").expect("written");
    std::fs::write(folder.path().join("outside.sig"), "{}").expect("written");
    let key = program.key();
    let run = |words: &[&str], exit: i32, with: &str| {
        let done = program.command(words).output().expect("the program starts");
        assert_eq!(done.status.code(), Some(exit), "{words:?}: {}", said(&done));
        assert!(said(&done).contains(with), "{words:?}: wanted {with} in {}", said(&done));
    };
    let seal = ["seal", "m", "store", "x", "--key", &key];
    run(&[&seal[..], &["--oms", "outside.sig"]].concat(), 2, "needs --oms-key");
    run(&[&seal[..], &["--oms", "outside.sig", "--oms-key", "pub.pem"]].concat(), 2, "lies outside");
    run(&[&seal[..], &["--oms-key", "pub.pem"]].concat(), 2, "model.sig");
    std::fs::write(folder.path().join("m/model.sig"), "{}").expect("written");
    std::fs::write(folder.path().join("pub.pem"), "no key").expect("written");
    run(&[&seal[..], &["--oms-key", "pub.pem"]].concat(), 2, "no key for --oms-key");
    run(&seal, 0, "--oms-key PUBLIC.pem checks it");
    let trust = program.trusted_key();
    let verify = ["verify", "store", "x", "--trust", trust.to_str().expect("UTF-8")];
    run(&[&verify[..], &["--oms", "--oms-key", "pub.pem"]].concat(), 2, "give --key");
    run(&[&verify[..], &["--oms"]].concat(), 2, "--oms-key");
}

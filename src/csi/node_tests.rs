//! The node service over a fake door.

use std::sync::atomic::AtomicUsize;

use super::super::asked::tests::{request, rules};
use super::*;

const GOOD: &[(&str, &str)] = &[
    ("model", "acme/llama"),
    ("key", "vault-transit:transit/llama"),
    ("vault-role", "llama"),
    ("store", "/srv/models"),
];

#[derive(Default)]
struct Stage {
    mounted: AtomicBool,
    abandoned: AtomicBool,
    refused: AtomicBool,
    /// Whoever is to be let in again has no keys.
    keys_gone: AtomicBool,
    rechecks: AtomicUsize,
    mounts: AtomicUsize,
    /// Vault does not answer a recheck until the test lets go of this.
    hanging: Mutex<()>,
    /// What the next mount or recheck meets.
    trouble: Mutex<Option<Code>>,
    tokens: Mutex<Vec<Vec<u8>>>,
}

impl Stage {
    fn meet(&self) -> Result<()> {
        match *self.trouble.lock().expect("alone") {
            Some(code) => Err(Error::new(code, "permission denied")),
            None => Ok(()),
        }
    }
}

struct FakeDoor(Arc<Stage>);
struct FakeMount(Arc<Stage>);

impl Door for FakeDoor {
    fn mount(&self, plan: MountPlan, may_enter: &dyn Fn() -> Result<()>) -> Result<Arc<dyn Shown>> {
        let crate::vault::AuthMethod::Kubernetes { jwt_file, role, .. } =
            &plan.access.vault.as_ref().expect("a vault").auth
        else {
            panic!("not the pod's own login")
        };
        assert_eq!(role, "llama");
        assert!(plan.allow_other && plan.umask == Some(0o222));
        assert_eq!(plan.service_account.as_deref(), Some("chat/reader"));
        let pod = plan.pod.as_ref().expect("the kubelet says which");
        assert_eq!((pod.name.as_str(), pod.uid.as_str()), ("chat/llama-0", "0f8fad5b-d9cb-469f-a165-70867728950e"));
        self.0.tokens.lock().expect("alone").push(std::fs::read(jwt_file).expect("the pod's token"));
        self.0.meet()?;
        may_enter()?;
        self.0.mounts.fetch_add(1, Ordering::Relaxed);
        self.0.mounted.store(true, Ordering::Relaxed);
        Ok(Arc::new(FakeMount(self.0.clone())))
    }
}

impl Shown for FakeMount {
    fn is_mounted(&self) -> bool {
        self.0.mounted.load(Ordering::Relaxed)
    }
    fn refuse(&self, why: Option<&str>) -> Result<()> {
        if why.is_none() && self.0.keys_gone.load(Ordering::Relaxed) {
            return Err(Error::new(Code::NoKey, "its key is read no more"));
        }
        self.0.refused.store(why.is_some(), Ordering::Relaxed);
        Ok(())
    }
    fn recheck(&self) -> Result<()> {
        self.0.rechecks.fetch_add(1, Ordering::Relaxed);
        drop(self.0.hanging.lock().expect("alone"));
        self.0.meet()
    }
    fn unmount(&self, _: Duration) -> Result<()> {
        self.0.mounted.store(false, Ordering::Relaxed);
        Ok(())
    }
    fn abandon(&self) -> Result<()> {
        self.0.abandoned.store(true, Ordering::Relaxed);
        Ok(())
    }
}

struct Bench {
    node: Node,
    stage: Arc<Stage>,
    folder: tempfile::TempDir,
}

impl Drop for Bench {
    fn drop(&mut self) {
        // A folder with a mount in it would outlive the test.
        let _ = targets::clear(&self.folder.path().canonicalize().expect("real"));
    }
}

/// `None` where the machine does not let us make a private folder, or a FUSE mount.
fn bench(recheck: Duration) -> Option<Bench> {
    if !crate::mem::has_cap_sys_admin() || !Path::new("/dev/fuse").exists() {
        assert!(std::env::var_os("CI").is_none(), "CI needs root and /dev/fuse");
        eprintln!("SKIPPED: needs root and /dev/fuse, to make a private folder and a mount");
        return None;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::create_dir(folder.path().join("pod")).expect("made");
    let mut layers = Layers::default();
    let words = ["vault-addr=https://vault:8200", "vault-auth=kubernetes", "cache=64MiB"].map(str::to_owned);
    layers.mount_options(&words, false).expect("words");
    let settings = Settings {
        name: "csi.modelfs".into(),
        node_id: "node1".into(),
        kubelet_dir: folder.path().canonicalize().expect("real"),
        volumes_max: 2,
        recheck,
        layers,
        rules: Rules { stores: vec!["/srv/models".into()], ..rules() },
    };
    let stage = Arc::new(Stage::default());
    let node = Node::new(settings, Box::new(FakeDoor(stage.clone()))).expect("a node");
    Some(Bench { node, stage, folder })
}

impl Bench {
    fn target(&self, name: &str) -> String {
        self.folder.path().canonicalize().expect("real").join("pod").join(name).to_str().expect("UTF-8").into()
    }
    fn asking(&self) -> NodePublishVolumeRequest {
        NodePublishVolumeRequest { target_path: self.target("mount"), ..request(GOOD) }
    }
    fn publish(&self) -> Result<(), Refusal> {
        self.node.publish(&self.asking())
    }
    fn unpublish(&self) -> Result<(), Refusal> {
        self.node
            .unpublish(&NodeUnpublishVolumeRequest { volume_id: "csi-1".into(), target_path: self.target("mount") })
    }
    fn trouble(&self, code: Option<Code>) {
        *self.stage.trouble.lock().expect("alone") = code;
    }
    /// As the kubelet does as long as it has the volume.
    fn wanted(&self) {
        std::fs::write(self.folder.path().join("pod/vol_data.json"), "{}").expect("written");
    }
    /// What a program meets that starts now.
    fn is_dead(&self) -> bool {
        std::fs::read_dir(self.target("mount")).is_err_and(|e| e.raw_os_error() == Some(libc::ENOTCONN))
    }
    fn refused(&self) -> bool {
        self.stage.refused.load(Ordering::Relaxed)
    }
}

#[test]
fn a_volume_is_published_with_its_pods_token_and_leaves_nothing() {
    let Some(bench) = bench(Duration::ZERO) else { return };
    bench.publish().expect("published");
    assert_eq!(*bench.stage.tokens.lock().expect("alone"), [b"pod-jwt"]);
    assert_eq!(bench.node.tokens(), 1);
    bench.publish().expect("the same again");
    assert_eq!(bench.stage.mounts.load(Ordering::Relaxed), 1);
    bench.unpublish().expect("unpublished");
    bench.unpublish().expect("and again");
    assert!(!Path::new(&bench.target("mount")).exists());
    assert_eq!(bench.node.tokens(), 0);
}

#[test]
fn another_volume_at_the_same_target_is_refused() {
    let Some(bench) = bench(Duration::ZERO) else { return };
    bench.publish().expect("published");
    let other = NodePublishVolumeRequest { volume_id: "csi-2".into(), ..bench.asking() };
    assert_eq!(bench.node.publish(&other).expect_err("refused").code, GrpcCode::AlreadyExists);
    let mut other = bench.asking();
    other.volume_context.insert("model".into(), "acme/other".into());
    assert_eq!(bench.node.publish(&other).expect_err("refused").code, GrpcCode::AlreadyExists);
}

#[test]
fn what_vault_refuses_is_told_in_words_and_leaves_no_folder_and_no_token() {
    let Some(bench) = bench(Duration::ZERO) else { return };
    bench.trouble(Some(Code::VaultDenied));
    let refusal = bench.publish().expect_err("refused");
    assert_eq!(refusal.code, GrpcCode::PermissionDenied);
    for word in ["model acme/llama", "service account chat/reader", "role llama", "permission denied", "VAULT_DENIED"] {
        assert!(refusal.message.contains(word), "`{word}` is not in: {}", refusal.message);
    }
    assert!(!refusal.message.contains("pod-jwt"));
    assert!(!Path::new(&bench.target("mount")).exists());
    assert_eq!(bench.node.tokens(), 0);
}

#[test]
fn a_volume_that_was_there_before_is_not_refused_for_good() {
    let Some(bench) = bench(Duration::ZERO) else { return };
    std::fs::create_dir(bench.target("mount")).expect("as the machine's last start left it");
    bench.trouble(Some(Code::VaultDenied));
    assert_eq!(bench.publish().expect_err("refused").code, GrpcCode::Unavailable);
    assert!(bench.is_dead(), "an empty folder is no model");
    bench.trouble(None);
    bench.publish().expect("published");
    assert!(!bench.is_dead(), "nothing lies under the new mount");
    bench.unpublish().expect("unpublished");
    assert!(!Path::new(&bench.target("mount")).exists());
}

#[test]
fn a_dead_mount_stays_until_the_next_one_is_ready() {
    let Some(bench) = bench(Duration::ZERO) else { return };
    for below in [None, Some("store")] {
        let mut asking = bench.asking();
        asking.volume_context.extend(below.map(|folder| ("below".to_owned(), folder.to_owned())));
        let place = targets::prepare(Path::new(&bench.target("mount")), below).expect("made");
        targets::hold(&place.folder).expect("as a killed driver left it");
        let dead = || crate::mounts::at(&place.folder).expect("read").map(|mount| mount.device);
        let before = dead();
        for code in [Code::VaultUnreachable, Code::Unreachable, Code::VaultDenied] {
            bench.trouble(Some(code));
            assert_eq!(bench.node.publish(&asking).expect_err("refused").code, GrpcCode::Unavailable);
            assert_eq!(dead(), before, "{code}");
        }
        bench.trouble(None);
        bench.node.publish(&asking).expect("published");
        assert_eq!(dead(), None);
        bench.unpublish().expect("unpublished");
        assert!(!Path::new(&bench.target("mount")).exists());
    }
}

/// The operator may take a store, a role or a key out of the configuration while pods have it.
#[test]
fn a_volume_that_was_there_is_told_to_wait_whatever_is_wrong_with_the_request_now() {
    let Some(bench) = bench(Duration::ZERO) else { return };
    let mut wrong = bench.asking();
    wrong.volume_context.insert("store".into(), "/srv/no-more".into());
    assert_eq!(bench.node.publish(&wrong).expect_err("refused").code, GrpcCode::InvalidArgument);
    let elsewhere = tempfile::tempdir().expect("a temporary folder");
    let elsewhere = elsewhere.path().to_str().expect("UTF-8").to_owned();
    let outside = NodePublishVolumeRequest { target_path: format!("{elsewhere}/mount"), ..bench.asking() };
    assert_eq!(bench.node.publish(&outside).expect_err("refused").code, GrpcCode::InvalidArgument);

    std::fs::create_dir(bench.target("mount")).expect("published once");
    assert_eq!(bench.node.publish(&wrong).expect_err("refused").code, GrpcCode::Unavailable);
    // The kubelet's folder is another one now.
    let outside = NodePublishVolumeRequest { target_path: elsewhere, ..bench.asking() };
    assert_eq!(bench.node.publish(&outside).expect_err("refused").code, GrpcCode::Unavailable);
    // What this driver has mounted is refused in plain words.
    bench.publish().expect("published");
    assert_eq!(bench.node.publish(&wrong).expect_err("refused").code, GrpcCode::InvalidArgument);
}

#[test]
fn what_lies_at_a_target_is_no_fault_of_the_request() {
    let Some(bench) = bench(Duration::ZERO) else { return };
    std::fs::create_dir(bench.target("mount")).expect("made");
    std::fs::write(Path::new(&bench.target("mount")).join("file"), "x").expect("written");
    assert_eq!(bench.unpublish().expect_err("not empty").code, GrpcCode::FailedPrecondition);
}

#[test]
fn at_the_end_what_the_kubelet_still_wants_stays_in_the_tree_and_the_rest_goes() {
    for wanted in [true, false] {
        let Some(bench) = bench(Duration::ZERO) else { return };
        bench.publish().expect("published");
        if wanted {
            bench.wanted();
        }
        bench.node.stop();
        assert_eq!(bench.stage.abandoned.load(Ordering::Relaxed), wanted);
        assert_eq!(bench.stage.mounted.load(Ordering::Relaxed), wanted);
        assert_eq!(bench.node.tokens(), 0);
    }
}

#[test]
fn the_end_waits_for_a_call_that_has_a_volume() {
    let Some(bench) = bench(Duration::ZERO) else { return };
    bench.publish().expect("published");
    bench.wanted();
    let claim = bench.node.claim(Path::new(&bench.target("mount")), None).expect("claimed");
    std::thread::scope(|all| {
        let stopping = all.spawn(|| bench.node.stop());
        while !bench.node.stopping.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        drop(claim);
        stopping.join().expect("stopped");
    });
    assert!(bench.stage.abandoned.load(Ordering::Relaxed));
    assert_eq!(bench.node.tokens(), 0);
}

#[test]
fn a_republish_shuts_whom_vault_refuses_and_lets_in_whom_it_allows_again() {
    let Some(bench) = bench(Duration::ZERO) else { return };
    bench.publish().expect("published");
    bench.trouble(Some(Code::VaultDenied));
    assert_eq!(bench.publish().expect_err("refused").code, GrpcCode::PermissionDenied);
    assert!(bench.refused());
    // An outage gives nothing back either.
    bench.trouble(Some(Code::VaultUnreachable));
    assert_eq!(bench.publish().expect_err("still refused").code, GrpcCode::PermissionDenied);
    assert!(bench.refused());
    // Allowed, but what was locked for want of a right does not open: nobody is told that he is let in.
    bench.trouble(None);
    bench.stage.keys_gone.store(true, Ordering::Relaxed);
    bench.publish().expect_err("its keys are read no more");
    bench.stage.keys_gone.store(false, Ordering::Relaxed);
    bench.publish().expect("allowed again");
    assert!(!bench.refused());
}

#[test]
fn an_outage_at_a_republish_takes_nothing_from_a_pod() {
    let Some(bench) = bench(Duration::ZERO) else { return };
    bench.publish().expect("published");
    for code in [Code::VaultUnreachable, Code::VaultSealed, Code::Unreachable, Code::Deadline, Code::StoreDenied] {
        bench.trouble(Some(code));
        bench.publish().expect("kept");
        assert!(!bench.refused(), "{code}");
    }
}

#[test]
fn a_right_is_proved_once_a_period_but_the_token_is_always_the_newest() {
    let Some(bench) = bench(Duration::from_secs(3600)) else { return };
    bench.publish().expect("published");
    let mut fresh = bench.asking();
    let tokens = r#"{"vault":{"token":"newer-jwt"}}"#;
    fresh.volume_context.insert("csi.storage.k8s.io/serviceAccount.tokens".into(), tokens.into());
    bench.node.publish(&fresh).expect("republished");
    assert_eq!(bench.stage.rechecks.load(Ordering::Relaxed), 0);
    let path = bench.node.tokens.path(&token_name(Path::new(&bench.target("mount"))));
    assert_eq!(std::fs::read(path).expect("a token"), b"newer-jwt");
}

#[test]
fn one_that_was_unmounted_outside_is_mounted_anew() {
    let Some(bench) = bench(Duration::ZERO) else { return };
    bench.publish().expect("published");
    bench.stage.mounted.store(false, Ordering::Relaxed);
    bench.publish().expect("again");
    assert_eq!(bench.stage.mounts.load(Ordering::Relaxed), 2);
    assert_eq!(bench.node.tokens(), 1);
}

#[test]
fn calls_for_one_target_do_not_overlap_and_volumes_are_bounded() {
    let Some(bench) = bench(Duration::ZERO) else { return };
    let target = PathBuf::from(bench.target("mount"));
    let claim = bench.node.claim(&target, None).expect("claimed");
    assert_eq!(bench.publish().expect_err("under way").code, GrpcCode::Aborted);
    drop(claim);
    bench.publish().expect("free again");
    let second = NodePublishVolumeRequest { target_path: bench.target("second"), ..bench.asking() };
    bench.node.publish(&second).expect("the second");
    let third = NodePublishVolumeRequest { target_path: bench.target("third"), ..bench.asking() };
    assert_eq!(bench.node.publish(&third).expect_err("too many").code, GrpcCode::ResourceExhausted);
    // The kubelet takes that for "perhaps there", and takes it off before its pod may go.
    let off = |target: String| NodeUnpublishVolumeRequest { volume_id: "csi-1".into(), target_path: target };
    bench.node.unpublish(&off(bench.target("third"))).expect("nothing to let go of");
    bench.node.unpublish(&off(bench.target("second"))).expect("let go");
    bench.node.publish(&third).expect("there is room again");
    bench.node.stop();
    assert_eq!(bench.node.publish(&third).expect_err("nobody would let go of it").code, GrpcCode::Unavailable);
}

/// A republish that waits for Vault has the volume; the driver ends before the answer.
#[test]
fn at_the_end_a_volume_that_a_call_still_waits_with_is_left_dead_too() {
    let Some(bench) = bench(Duration::ZERO) else { return };
    bench.publish().expect("published");
    bench.wanted();
    let hanging = bench.stage.hanging.lock().expect("alone");
    std::thread::scope(|all| {
        all.spawn(|| bench.publish());
        let until = Instant::now() + Duration::from_secs(120);
        while bench.stage.rechecks.load(Ordering::Relaxed) == 0 {
            assert!(Instant::now() < until, "no recheck");
            std::thread::sleep(Duration::from_millis(5));
        }
        bench.node.stop();
        let left = bench.stage.abandoned.load(Ordering::Relaxed);
        drop(hanging);
        assert!(left, "a bare folder is to be");
    });
}

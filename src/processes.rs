//! Which process a thread belongs to, and which container and pod a process: read from /proc, which asks no filesystem. And
//! our own children: who waits for which of them.
//!
//! In: numbers the kernel gave us. Out: what /proc says at that moment; a process of another pid namespace, or one that is
//! gone, is nobody.
//! Promises: never waits for a mount; never an error, since processes come and go.
//! Held by: the tests below.

use std::io;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use serde::Serialize;

/// What can be told of a process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Process {
    pub pid: u32,
    pub uid: Option<u32>,
    pub command: String,
    /// The program's file, where we may look.
    pub exe: Option<PathBuf>,
    /// The path of its control group, of whichever hierarchy [`path_in`] goes by.
    pub cgroup: Option<String>,
    /// The container's id, as docker, podman, containerd and CRI-O name it.
    pub container: Option<String>,
    /// The UID of the Kubernetes pod.
    pub pod: Option<String>,
}

/// A pod of Kubernetes, as the kubelet tells of it with a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    /// `NAMESPACE/NAME`.
    pub name: String,
    pub uid: String,
}

/// The process of a thread, if both are visible here.
pub fn process_of(thread: u32) -> Option<u32> {
    field(&status(thread)?, "Tgid:")
}

/// What /proc says of a process; of one that is gone only its number is left.
pub fn process(pid: u32) -> Process {
    let uid = status(pid).and_then(|status| field(&status, "Uid:"));
    let command = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_string();
    let exe = std::fs::read_link(format!("/proc/{pid}/exe")).ok();
    let cgroup = cgroup_of(pid);
    let (container, pod) = cgroup.as_deref().map(container_and_pod).unwrap_or_default();
    Process { pid, uid, command, exe, cgroup, container, pod }
}

/// By what a thread may be judged that the kernel does not say with its requests.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    pub pid: u32,
    /// As whom it looks at files.
    pub uid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    pub cgroup: Option<String>,
    pub container: Option<String>,
    pub pod: Option<String>,
}

/// `None` where the thread is not visible here, or any of it cannot be read: half of it would be somebody else.
pub fn seen(thread: u32) -> Option<Seen> {
    let status = status(thread)?;
    let groups = status.lines().find_map(|line| line.strip_prefix("Groups:"))?;
    let groups = groups.split_whitespace().map(|gid| gid.parse().ok()).collect::<Option<Vec<u32>>>()?;
    let cgroup = cgroup_of(thread)?;
    let (container, pod) = container_and_pod(&cgroup);
    // Real, effective, saved, and that of file systems.
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    let uid = uids.split_whitespace().nth(3)?.parse().ok()?;
    Some(Seen { pid: field(&status, "Tgid:")?, uid, groups, cgroup: Some(cgroup), container, pod })
}

/// Whether /proc counts processes as the kernel does with our requests. In a pid namespace of our own with the /proc of
/// another a number is somebody else's there.
fn proc_is_ours() -> bool {
    static OURS: OnceLock<bool> = OnceLock::new();
    let own =
        || std::fs::read_link("/proc/self").is_ok_and(|own| own.as_os_str() == std::process::id().to_string().as_str());
    *OURS.get_or_init(own)
}

fn status(pid: u32) -> Option<String> {
    // 0 is what the kernel says of a process that this pid namespace does not show.
    if pid == 0 || !proc_is_ours() { None } else { std::fs::read_to_string(format!("/proc/{pid}/status")).ok() }
}

/// The first number of a line of /proc/PID/status.
fn field(status: &str, name: &str) -> Option<u32> {
    status.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
}

fn cgroup_of(pid: u32) -> Option<String> {
    path_in(&std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?).map(str::to_owned)
}

/// The path that a process is judged by, of a text as /proc/PID/cgroup has it: "hierarchy:controllers:path" in each line.
///
/// That of version 2 (hierarchy 0), unless everything lies at its root, as on a host that uses version 1; else that of systemd;
/// else the first. A host that mixes both may have its containers in version 1 alone, while version 2 tells of their engine: of
/// those two, the first that names a container or a pod goes first. Other controllers' groups may be anybody's, whatever they are
/// called and however long: they count only where neither of the two knows the process.
fn path_in(text: &str) -> Option<&str> {
    let lines = || text.lines().filter_map(|line| line.split_once(':'));
    let lines = || lines().filter_map(|(number, rest)| Some((number, rest.split_once(':')?)));
    let unified =
        lines().find(|(number, (controllers, path))| *number == "0" && controllers.is_empty() && *path != "/");
    let systemd = lines().find(|(_, (controllers, _))| *controllers == "name=systemd");
    // Only where there is no version 1 is the root of version 2 left.
    let others = lines().filter(|(number, _)| *number != "0").chain(lines());
    let knows = |line: &(&str, (&str, &str))| line.1.1 != "/";
    let known = || unified.into_iter().chain(systemd.filter(knows));
    let unknown = others.clone().filter(|_| known().next().is_none());
    let named = known().chain(unknown).map(|(_, (_, path))| path).find(|path| container_and_pod(path) != (None, None));
    named.or_else(|| unified.into_iter().chain(systemd).chain(others).map(|(_, (_, path))| path).next())
}

/// A component of a control group's path that is named as engines name containers and pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Name<'a> {
    Container(&'a str),
    Pod(String),
}

impl Name<'_> {
    /// Known forms: `/docker/ID`, `docker-ID.scope`, `libpod-ID.scope`, `cri-containerd-ID.scope`, `crio-ID.scope`,
    /// `kubepods/burstable/podUID/ID`, `kubepods-burstable-podUID.slice/...`.
    pub fn of(part: &str) -> Option<Name<'_>> {
        let part = part.strip_suffix(".scope").or_else(|| part.strip_suffix(".slice")).unwrap_or(part);
        if let Some(uid) = pod_uid(part) {
            return Some(Name::Pod(uid));
        }
        // The monitor of a container is outside it.
        let id = part.rsplit(['-', ':']).next().unwrap_or(part);
        (is_hex(id, 64) && !part.contains("conmon")).then_some(Name::Container(id))
    }
}

/// The names in a control group's path, from the outside in.
pub fn names(cgroup: &str) -> impl Iterator<Item = Name<'_>> {
    cgroup.split('/').filter_map(Name::of)
}

/// The container and the pod that a control group is in: the outermost one, and if that is a pod the container right below.
///
/// The outermost name is the engine's. Whoever is inside may make groups below his own, of any name: they are his word alone.
pub fn container_and_pod(cgroup: &str) -> (Option<String>, Option<String>) {
    let mut names = names(cgroup);
    match names.next() {
        Some(Name::Container(id)) => (Some(id.to_owned()), None),
        Some(Name::Pod(uid)) => match names.next() {
            Some(Name::Container(id)) => (Some(id.to_owned()), Some(uid)),
            Some(Name::Pod(_)) | None => (None, Some(uid)),
        },
        None => (None, None),
    }
}

fn pod_uid(part: &str) -> Option<String> {
    let uid = match part.strip_prefix("pod") {
        Some(uid) => uid,
        None if part.starts_with("kubepods") => part.rsplit_once("-pod")?.1,
        None => return None,
    };
    // systemd's slices cannot hold dashes of their own.
    let uid = uid.replace('_', "-");
    let plain: String = uid.chars().filter(|c| *c != '-').collect();
    is_hex(&plain, 32).then_some(uid)
}

fn is_hex(text: &str, len: usize) -> bool {
    text.len() == len && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// Held while somebody waits for a child of ours by its number: [`reap`] takes what it finds.
static CHILDREN: Mutex<()> = Mutex::new(());

fn children() -> MutexGuard<'static, ()> {
    CHILDREN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a helper to its end. The only way to do so in a process that may also [`reap`].
pub fn output(command: &mut Command) -> io::Result<Output> {
    let _children = children();
    command.output()
}

/// Starts a child that [`reap`] will tell of.
#[allow(clippy::zombie_processes)] // waited for among all others
pub fn spawn(command: &mut Command) -> io::Result<libc::pid_t> {
    let _children = children();
    // Neither killed nor waited for when dropped.
    Ok(command.spawn()?.id() as libc::pid_t)
}

/// What became of a child.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// `code`: as a shell tells it, 128 and the signal if one ended it.
    Ended {
        pid: libc::pid_t,
        code: u8,
    },
    Stopped {
        pid: libc::pid_t,
        signal: i32,
    },
}

/// Takes note of every child that has ended or stopped, orphans that came to us among them; waits for none. Whether there
/// are children left.
pub fn reap(mut told: impl FnMut(Change)) -> bool {
    let _children = children();
    loop {
        let mut status = 0;
        // SAFETY: `status` outlives the call.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG | libc::WUNTRACED) };
        match pid {
            0 => return true,
            // No child, or interrupted: then there is a next time.
            ..0 => return io::Error::last_os_error().raw_os_error() != Some(libc::ECHILD),
            _ if libc::WIFEXITED(status) => told(Change::Ended { pid, code: libc::WEXITSTATUS(status) as u8 }),
            _ if libc::WIFSIGNALED(status) => told(Change::Ended { pid, code: 128 + libc::WTERMSIG(status) as u8 }),
            _ if libc::WIFSTOPPED(status) => told(Change::Stopped { pid, signal: libc::WSTOPSIG(status) }),
            _ => {}
        }
    }
}

/// kill(2): of one process, or by a number below 0 of many.
pub fn tell(pid: libc::pid_t, signal: i32) -> io::Result<()> {
    // SAFETY: plain numbers.
    if unsafe { libc::kill(pid, signal) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_and_pods_are_found_in_every_known_form_of_path() {
        let id = "3f2a".repeat(16);
        let uid = "0f8fad5b-d9cb-469f-a165-70867728950e";
        let flat = uid.replace('-', "_");
        let cases = [
            (format!("/docker/{id}"), true, false),
            (format!("/system.slice/docker-{id}.scope"), true, false),
            (format!("/machine.slice/libpod-{id}.scope/container"), true, false),
            (format!("/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{id}.scope"), true, false),
            (format!("/kubepods/burstable/pod{uid}/{id}"), true, true),
            (format!("/kubepods.slice/kubepods-pod{flat}.slice/cri-containerd-{id}.scope"), true, true),
            (
                format!(
                    "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{flat}.slice/crio-{id}.scope"
                ),
                true,
                true,
            ),
            (format!("/kubelet/kubepods/besteffort/pod{uid}/{id}"), true, true),
            (format!("/machine.slice/libpod-conmon-{id}.scope"), false, false),
            ("/user.slice/user-1000.slice/session-3.scope".into(), false, false),
            ("/podinfo/pod-of-mine".into(), false, false),
            ("/".into(), false, false),
        ];
        for (path, has_container, has_pod) in cases {
            let (container, pod) = container_and_pod(&path);
            assert_eq!(container, has_container.then(|| id.clone()), "{path}");
            assert_eq!(pod, has_pod.then(|| uid.to_string()), "{path}");
        }
    }

    /// Texts of real machines, shortened in the middle where lines repeat.
    #[test]
    fn a_process_is_judged_by_version_2_else_by_systemd_and_by_no_other_controllers_path() {
        let id = "3f2a".repeat(16);
        // Version 2 alone: a service, a login, a container of docker, what lies at the root.
        assert_eq!(path_in("0::/system.slice/vllm.service\n"), Some("/system.slice/vllm.service"));
        let login = "/user.slice/user-1000.slice/user@1000.service/app.slice/app-a:b.scope";
        assert_eq!(path_in(&format!("0::{login}\n")), Some(login), "a path may hold colons");
        let docker = format!("/system.slice/docker-{id}.scope");
        assert_eq!(path_in(&format!("0::{docker}\n")), Some(docker.as_str()));
        assert_eq!(path_in("0::/\n"), Some("/"));

        // Hybrid, as systemd makes it: a service, with a group of a longer name in another hierarchy.
        let hybrid = |memory: &str, systemd: &str, unified: &str| {
            format!(
                "12:pids:/system.slice/vllm.service\n11:rdma:/\n10:freezer:/\n9:perf_event:/\n8:devices:/system.slice\n\
                 7:memory:{memory}\n6:cpu,cpuacct:/system.slice\n5:blkio:/system.slice\n4:net_cls,net_prio:/\n3:hugetlb:/\n\
                 2:cpuset:/\n1:name=systemd:{systemd}\n0::{unified}\n"
            )
        };
        let (service, far) = ("/system.slice/vllm.service", "/batch/a-group-of-memory-with-a-longer-name");
        assert_eq!(path_in(&hybrid(far, service, service)), Some(service));
        assert_eq!(path_in(&hybrid(far, service, "/")), Some(service), "version 2 is not used there");
        assert_eq!(path_in(&hybrid(far, "/", "/")), Some("/"), "nor is systemd's elsewhere");
        // A container of docker with cgroupfs: version 2 tells of the engine.
        let of_docker = format!("/docker/{id}");
        let engine = "/system.slice/containerd.service";
        assert_eq!(path_in(&hybrid(&of_docker, &of_docker, engine)), Some(of_docker.as_str()));
        assert_eq!(path_in(&hybrid(&of_docker, "/", "/")), Some(of_docker.as_str()), "systemd knows nothing of it");
        // A user's own group of another controller, called as a container's.
        assert_eq!(path_in(&hybrid(&format!("/user/bob/0/{id}"), service, "/")), Some(service));
        assert_eq!(path_in(&hybrid(&format!("/user/bob/0/{id}"), "/", service)), Some(service));

        // Version 1: with systemd, without it, and before version 2.
        let old = "11:memory:/user.slice/user-0.slice/session-3.scope\n10:pids:/user.slice/user-0.slice/session-3.scope\n\
                   9:cpuset:/\n1:name=systemd:/user.slice/user-0.slice/session-3.scope\n";
        assert_eq!(path_in(old), Some("/user.slice/user-0.slice/session-3.scope"));
        let openrc = "9:memory:/vllm\n8:cpu,cpuacct:/a/longer/one\n1:name=openrc:/vllm\n0::/\n";
        assert_eq!(path_in(openrc), Some("/vllm"));
        let pod =
            format!("11:memory:/kubepods/burstable/pod0f8fad5b-d9cb-469f-a165-70867728950e/{id}\n1:name=systemd:/\n");
        assert_eq!(path_in(&pod).map(container_and_pod).and_then(|(container, _)| container), Some(id));
        assert_eq!(path_in(""), None);
    }

    #[test]
    fn a_name_below_a_container_is_the_containers_own_doing() {
        let (outer, inner) = ("c".repeat(64), "3f2a".repeat(16));
        let (uid, other) = ("0f8fad5b-d9cb-469f-a165-70867728950e", "11111111-d9cb-469f-a165-70867728950e");
        let (in_outer, of_pod) = ((Some(outer.clone()), None), (None, Some(uid.to_string())));
        for (path, wanted) in [
            (format!("/system.slice/docker-{outer}.scope/{inner}"), &in_outer),
            (format!("/system.slice/docker-{outer}.scope/system.slice/docker-{inner}.scope"), &in_outer),
            (format!("/docker/{outer}/kubepods/pod{uid}"), &in_outer),
            (format!("/docker/{outer}/kubepods/pod{uid}/{inner}"), &in_outer),
            (format!("/kubepods/burstable/pod{uid}"), &of_pod),
            (format!("/kubepods/burstable/pod{uid}/pod{other}/{inner}"), &of_pod),
        ] {
            assert_eq!(&container_and_pod(&path), wanted, "{path}");
        }
        let deep = format!("/kubepods/burstable/pod{uid}/{outer}/kubepods/pod{other}/{inner}");
        assert_eq!(container_and_pod(&deep), (Some(outer.clone()), Some(uid.to_string())));
        let all: Vec<Name> = names(&deep).collect();
        let pod = |uid: &str| Name::Pod(uid.to_string());
        assert_eq!(all, [pod(uid), Name::Container(&outer), pod(other), Name::Container(&inner)]);
    }

    #[test]
    fn a_thread_leads_to_its_process_and_an_unknown_one_to_nobody() {
        // SAFETY: the call only reads this thread's number.
        let thread = std::thread::spawn(|| process_of(unsafe { libc::gettid() } as u32));
        assert_eq!(thread.join().expect("a thread"), Some(std::process::id()));
        assert_eq!(process_of(0), None);
        assert_eq!(seen(0), None);
        let own = seen(std::process::id()).expect("visible to itself");
        // SAFETY: only reads this process's credentials.
        let uid = unsafe { libc::geteuid() };
        assert_eq!((own.pid, own.uid, own.cgroup.is_some()), (std::process::id(), uid, true));
        // SAFETY: reads this process's credentials.
        assert_eq!(process(std::process::id()).uid, Some(unsafe { libc::getuid() }));
    }
}

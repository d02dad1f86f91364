//! Who may ask what of a mount: by whom the kernel names at the other end of a Unix socket.
//!
//! In: a connected socket, [`RolesPlan`]. Out: the highest role of the peer, or none.
//! Promises: root and whoever mounted are admins; nobody is anything else without being named; supplementary groups are
//! those that the kernel noted at connect, not what /proc says later.
//! Held by: the tests below, tests/observe.rs.

use std::os::fd::AsRawFd;

use crate::config::oversight::{Peers, RolesPlan};
use crate::error::{Code, Error, Result};
use crate::processes;
use crate::telemetry::events::Actor;

/// More groups than this are not asked for: Linux gives a process at most so many.
const GROUPS_MAX: usize = 65_536;

/// Each may what those before it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Status, numbers, health.
    Viewer,
    /// Lock, unlock, reload, sessions.
    Operator,
    /// Stop.
    Admin,
}

impl Role {
    pub const fn name(self) -> &'static str {
        match self {
            Role::Viewer => "viewer",
            Role::Operator => "operator",
            Role::Admin => "admin",
        }
    }

    /// The highest one of `peer`.
    pub fn of(plan: &RolesPlan, peer: &Peer) -> Option<Role> {
        if peer.is_master() {
            return Some(Role::Admin);
        }
        let named = |peers: &[Peers]| peers.iter().any(|one| peer.is(*one));
        [(Role::Admin, &plan.admins), (Role::Operator, &plan.operators), (Role::Viewer, &plan.viewers)]
            .into_iter()
            .find(|(_, peers)| named(peers))
            .map(|(role, _)| role)
    }
}

/// Whether anybody but root and the mounting user is named.
pub fn anyone_named(plan: &RolesPlan) -> bool {
    !(plan.viewers.is_empty() && plan.operators.is_empty() && plan.admins.is_empty())
}

/// The process at the other end, as it was when it connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    pub uid: u32,
    pub gid: u32,
    /// 0 where it cannot be seen.
    pub pid: i32,
    pub groups: Vec<u32>,
}

impl Peer {
    /// # Errors
    /// `HOST` if the kernel does not say.
    pub fn of(stream: &impl AsRawFd) -> Result<Peer> {
        let mut cred = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
        let mut len = size_of::<libc::ucred>() as libc::socklen_t;
        // SAFETY: `cred` and `len` outlive the call and `len` is the size of `cred`.
        let rc = unsafe {
            let cred = (&raw mut cred).cast();
            libc::getsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, cred, &raw mut len)
        };
        if rc != 0 || len as usize != size_of::<libc::ucred>() {
            return Err(Error::os(Code::Host, "cannot learn who is at the other end of a socket"));
        }
        Ok(Peer { uid: cred.uid, gid: cred.gid, pid: cred.pid, groups: groups(stream)? })
    }

    /// Root, or whoever mounted.
    pub fn is_master(&self) -> bool {
        // SAFETY: geteuid only reads this process's credentials.
        self.uid == 0 || self.uid == unsafe { libc::geteuid() }
    }

    fn is(&self, one: Peers) -> bool {
        match one {
            Peers::Uid(uid) => self.uid == uid,
            Peers::Gid(gid) => self.gid == gid || self.groups.contains(&gid),
        }
    }

    /// For an event: the kernel's word for who, /proc's for the rest.
    pub fn actor(&self) -> Actor {
        let seen = u32::try_from(self.pid).ok().filter(|pid| *pid != 0).map(processes::process);
        let mut actor = Actor { uid: Some(self.uid), gid: Some(self.gid), ..Actor::default() };
        if let Some(seen) = seen {
            actor.pid = Some(seen.pid);
            actor.command = Some(seen.command).filter(|command| !command.is_empty());
            (actor.exe, actor.cgroup, actor.container, actor.pod) = (seen.exe, seen.cgroup, seen.container, seen.pod);
        }
        actor
    }
}

fn groups(stream: &impl AsRawFd) -> Result<Vec<u32>> {
    let mut groups = vec![0u32; 64];
    loop {
        let mut len = (groups.len() * size_of::<u32>()) as libc::socklen_t;
        // SAFETY: `groups` is as long as `len` says, and both outlive the call.
        let rc = unsafe {
            let to = groups.as_mut_ptr().cast();
            libc::getsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERGROUPS, to, &raw mut len)
        };
        let count = len as usize / size_of::<u32>();
        match (rc, std::io::Error::last_os_error().raw_os_error()) {
            (0, _) => {
                groups.truncate(count);
                return Ok(groups);
            }
            // The kernel says how many there are.
            (_, Some(libc::ERANGE)) if count > groups.len() && count <= GROUPS_MAX => groups.resize(count, 0),
            _ => return Err(Error::os(Code::Host, "cannot learn the groups of who is at the other end of a socket")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn plan() -> RolesPlan {
        RolesPlan {
            viewers: vec![Peers::Gid(50), Peers::Uid(7)],
            operators: vec![Peers::Gid(60)],
            admins: vec![Peers::Uid(9)],
        }
    }

    fn peer(uid: u32, gid: u32, groups: &[u32]) -> Peer {
        Peer { uid, gid, pid: 0, groups: groups.to_vec() }
    }

    #[test]
    fn the_highest_role_counts_by_uid_by_group_and_by_supplementary_group() {
        let cases = [
            (peer(0, 0, &[]), Some(Role::Admin)),
            (peer(7, 1, &[]), Some(Role::Viewer)),
            (peer(8, 50, &[]), Some(Role::Viewer)),
            (peer(8, 1, &[3, 50]), Some(Role::Viewer)),
            (peer(8, 50, &[60]), Some(Role::Operator)),
            (peer(9, 50, &[60]), Some(Role::Admin)),
            (peer(8, 1, &[2]), None),
            // A number is a user or a group, not both.
            (peer(50, 7, &[9]), None),
        ];
        for (who, wanted) in cases {
            assert_eq!(Role::of(&plan(), &who), wanted, "{who:?}");
        }
        assert_eq!(Role::of(&RolesPlan::default(), &peer(7, 50, &[60])), None);
        assert!(anyone_named(&plan()) && !anyone_named(&RolesPlan::default()));
    }

    #[test]
    fn the_kernel_names_the_peer_with_its_groups() {
        let (one, _other) = UnixStream::pair().expect("a pair");
        let peer = Peer::of(&one).expect("named");
        // SAFETY: these calls read this process's credentials; the array is as long as the call is told.
        let (uid, gid, own) = unsafe {
            let mut own = vec![0u32; GROUPS_MAX];
            let count = libc::getgroups(own.len() as i32, own.as_mut_ptr());
            own.truncate(usize::try_from(count).expect("groups can be read"));
            (libc::geteuid(), libc::getegid(), own)
        };
        assert_eq!((peer.uid, peer.gid, peer.pid as u32), (uid, gid, std::process::id()));
        assert_eq!(peer.groups, own);
        assert_eq!(Role::of(&RolesPlan::default(), &peer), Some(Role::Admin));
        assert_eq!(peer.actor().pid, Some(std::process::id()));
    }
}

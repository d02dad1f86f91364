//! The command: what it gets of us and what it does not.
//!
//! Promises: no variable that holds a secret of ours is in its environment; no descriptor, lock, limit or signal mask of
//! ours reaches it; at a terminal it is the foreground job; it hears when we die.
//! Held by: tests/run_command.sh.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use zeroize::Zeroizing;

use super::RunPlan;
use super::signals::Signals;
use crate::error::Result;
use crate::keys::KeySource;
use crate::mem::{self, LockedBuf};
use crate::processes;
use crate::store::{ENV_CREDENTIALS, StoreUrl};
use crate::vault::AuthMethod;

/// As a shell says that there is no such command.
pub const NOT_FOUND: u8 = 127;
/// As a shell says that there is one that cannot be executed.
pub const NOT_EXECUTABLE: u8 = 126;

/// Whatever opens a model, or logs in to what opens it, and the addresses at which whoever knows them may speak in our name.
const KEY_VARIABLES: [&str; 7] = [
    "MODELFS_ALERT_WEBHOOK",
    "MODELFS_KEY",
    "MODELFS_PASSPHRASE",
    "MODELFS_VAULT_PASSWORD",
    "MODELFS_VAULT_SECRET_ID",
    "MODEL_ENCRYPTION_KEY",
    "VAULT_TOKEN",
];

/// From a service manager to us: the command cannot answer for the mount.
const MANAGER_VARIABLES: [&str; 3] = ["NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"];

pub struct Plan {
    words: Vec<OsString>,
    /// Of the environment, for us alone.
    keys: Vec<OsString>,
    /// Whatever reads the bucket, or logs in to Vault with the same; the command has the mount instead.
    store: Vec<OsString>,
    /// Of those, what the command gets all the same: we take them out of the environment before it starts.
    kept: Vec<(OsString, LockedBuf)>,
    core_limit: Option<libc::rlimit>,
    /// Standard input is a terminal, and we are its foreground job.
    terminal: bool,
}

impl Plan {
    /// # Errors
    /// `MEMLOCK` if what the command is to keep cannot be held for it.
    pub fn new(plan: &RunPlan) -> Result<Plan> {
        let kept = |name: &OsStr| plan.keep_env.iter().any(|keep| keep == name);
        let named = plan
            .mount
            .access
            .keys
            .iter()
            .filter_map(|source| if let KeySource::Env(name) = source { Some(name.as_str()) } else { None });
        let mut keys: Vec<OsString> = KEY_VARIABLES.into_iter().chain(named).map(OsString::from).collect();
        keys.retain(|name| !kept(name));
        let reads_s3 = matches!(plan.mount.store, StoreUrl::S3 { .. } | StoreUrl::VaultKv { .. });
        let vault = plan.mount.access.vault.as_ref();
        let logs_in = vault.is_some_and(|vault| matches!(vault.auth, AuthMethod::Aws { .. }));
        let ours = ENV_CREDENTIALS.into_iter().filter(|_| reads_s3 || logs_in);
        let (given, store): (Vec<OsString>, Vec<OsString>) = ours.map(OsString::from).partition(|name| kept(name));
        let kept = given.into_iter().filter_map(|name| {
            let value = Zeroizing::new(std::env::var_os(&name)?.into_encoded_bytes());
            Some(LockedBuf::copy_of(&value).map(|value| (name, value)))
        });
        let kept = kept.collect::<Result<_>>()?;
        // SAFETY: both calls only ask about descriptor 0 and this process.
        let terminal = unsafe { libc::tcgetpgrp(0) == libc::getpgrp() };
        Ok(Plan { words: plan.command.clone(), keys, store, kept, core_limit: None, terminal })
    }

    pub fn name(&self) -> String {
        self.words[0].to_string_lossy().into_owned()
    }

    /// Whether such a file is there, so that what was mistyped is told before a model is fetched.
    pub fn is_there(&self) -> bool {
        let word = Path::new(&self.words[0]);
        if word.components().count() > 1 || word.has_root() {
            return word.exists();
        }
        let path = std::env::var_os("PATH").unwrap_or_else(|| "/bin:/usr/bin".into());
        std::env::split_paths(&path).any(|folder| folder.join(word).exists())
    }

    /// The limits that hardening lowers, as they were.
    pub fn note_limits(&mut self) {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: the kernel writes the rlimit we own.
        let known = unsafe { libc::getrlimit(libc::RLIMIT_CORE, &mut limit) } == 0;
        self.core_limit = known.then_some(limit);
    }

    /// Once the models are open: what no key source took is overwritten where the kernel put it.
    pub fn forget_secrets(&self) {
        for name in self.keys.iter().filter_map(|name| name.to_str()) {
            // Cannot be locked, hence not taken: then it is still not given on.
            drop(mem::take_env(name));
        }
    }

    /// Starts it. On failure the exit code that says so, told in the log.
    pub fn start(&self, signals: &Signals) -> Result<libc::pid_t, u8> {
        let mut command = Command::new(&self.words[0]);
        command.args(&self.words[1..]);
        for name in self.keys.iter().chain(&self.store) {
            command.env_remove(name);
        }
        for (name, value) in &self.kept {
            command.env(name, OsStr::from_bytes(value));
        }
        for name in MANAGER_VARIABLES {
            command.env_remove(name);
        }
        let (core_limit, terminal) = (self.core_limit, self.terminal);
        let restore_mask = signals.restore();
        // SAFETY: the closure makes system calls only, on numbers it holds itself.
        unsafe {
            command.pre_exec(move || {
                // A process group of its own: a key at the terminal reaches the command by the kernel alone, not twice.
                libc::setpgid(0, 0);
                if terminal {
                    // Still held: a background job that asks for the terminal is not stopped.
                    libc::tcsetpgrp(0, libc::getpid());
                }
                if let Some(limit) = &core_limit {
                    libc::setrlimit(libc::RLIMIT_CORE, limit);
                }
                // Without us its files are gone: it is told, and may end well.
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM as libc::c_ulong, 0, 0, 0);
                restore_mask();
                Ok(())
            });
        }
        // Reaped by its number among all others, hence not waited for here.
        match processes::spawn(&mut command) {
            Ok(pid) => Ok(pid),
            Err(error) => {
                tracing::error!("{} cannot be executed: {error}", self.name());
                Err(if error.kind() == std::io::ErrorKind::NotFound { NOT_FOUND } else { NOT_EXECUTABLE })
            }
        }
    }

    /// Whoever waits for us at the terminal gets it back in the hands of our group.
    pub fn take_terminal_back(&self) {
        if self.terminal {
            // SAFETY: plain numbers; SIGTTOU is held, so that we are not stopped for it.
            unsafe { libc::tcsetpgrp(0, libc::getpgrp()) };
        }
    }
}

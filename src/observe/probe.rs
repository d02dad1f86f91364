//! Whether mounts answer, asked so that one which hangs holds up nobody.
//!
//! Promises: at most one thread for each mountpoint waits for an answer, however often it is asked; while it does, the answer
//! is no.
//! Held by: the tests below.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use crate::mounts;

/// A daemon answers this from memory.
const WAIT: Duration = Duration::from_secs(2);

pub struct Probe {
    ask: fn(&Path) -> bool,
    waiting: Arc<Mutex<HashSet<PathBuf>>>,
}

impl Default for Probe {
    fn default() -> Probe {
        Probe { ask: mounts::answers, waiting: Arc::default() }
    }
}

impl Probe {
    pub fn answers(&self, mountpoint: &Path) -> bool {
        let waiting = || self.waiting.lock().expect("a thread died holding the probes");
        if !waiting().insert(mountpoint.to_owned()) {
            return false;
        }
        let (tell, told) = mpsc::channel();
        let spawned = std::thread::Builder::new().name("probe".into()).spawn({
            let (ask, waiting, mountpoint) = (self.ask, self.waiting.clone(), mountpoint.to_owned());
            move || {
                let answers = ask(&mountpoint);
                waiting.lock().expect("a thread died holding the probes").remove(&mountpoint);
                // Whoever asked may have given up.
                let _ = tell.send(answers);
            }
        });
        if spawned.is_err() {
            waiting().remove(mountpoint);
            return false;
        }
        told.recv_timeout(WAIT).unwrap_or(false)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::time::Instant;

    use super::*;

    #[test]
    fn one_that_hangs_is_asked_once_and_is_heard_again_when_it_answers() {
        static HANGS: AtomicBool = AtomicBool::new(true);
        static ASKED: AtomicUsize = AtomicUsize::new(0);
        fn ask(_: &Path) -> bool {
            ASKED.fetch_add(1, Ordering::SeqCst);
            while HANGS.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            }
            true
        }
        let probe = Probe { ask, ..Probe::default() };
        for _ in 0..20 {
            assert!(!probe.answers(Path::new("/a")));
        }
        assert_eq!(ASKED.load(Ordering::SeqCst), 1, "no thread for each question");
        HANGS.store(false, Ordering::SeqCst);
        let until = Instant::now() + Duration::from_secs(120);
        while !probe.answers(Path::new("/a")) {
            assert!(Instant::now() < until);
        }
        assert!(!Probe::default().answers(Path::new("/no/such/mount")));
        let probe = Probe::default();
        // What is not answered in time, since the machine was held up, is asked again.
        while !probe.answers(Path::new("/proc")) {
            assert!(Instant::now() < until);
        }
    }
}

//! Whether mounts answer, asked so that one which hangs holds up nobody.
//!
//! Promises: at most one thread for each mountpoint waits for an answer, however often it is asked; who asks meanwhile gets
//! that answer too, and none waits for longer than the first; one that takes longer is no.
//! Held by: the tests below.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use crate::mounts;

/// A daemon answers this from memory.
const WAIT: Duration = Duration::from_secs(2);

pub struct Probe {
    ask: fn(&Path) -> bool,
    wait: Duration,
    waiting: Arc<Mutex<HashMap<PathBuf, Arc<Question>>>>,
}

/// One question at one mount, and whoever waits for its answer.
struct Question {
    until: Instant,
    answer: Mutex<Option<bool>>,
    told: Condvar,
}

impl Question {
    fn tell(&self, answers: bool) {
        *self.answer.lock().expect("a thread died holding an answer") = Some(answers);
        self.told.notify_all();
    }

    fn wait(&self) -> bool {
        let answer = self.answer.lock().expect("a thread died holding an answer");
        let left = self.until.saturating_duration_since(Instant::now());
        let (answer, _) =
            self.told.wait_timeout_while(answer, left, |answer| answer.is_none()).expect("a thread died with it");
        answer.unwrap_or(false)
    }
}

impl Default for Probe {
    fn default() -> Probe {
        Probe { ask: mounts::answers, wait: WAIT, waiting: Arc::default() }
    }
}

impl Probe {
    pub fn answers(&self, mountpoint: &Path) -> bool {
        let mut waiting = self.waiting.lock().expect("a thread died holding the probes");
        if let Some(asked) = waiting.get(mountpoint).cloned() {
            drop(waiting);
            return asked.wait();
        }
        let until = Instant::now() + self.wait;
        let question = Arc::new(Question { until, answer: Mutex::new(None), told: Condvar::new() });
        waiting.insert(mountpoint.to_owned(), question.clone());
        drop(waiting);
        let spawned = std::thread::Builder::new().name("probe".into()).spawn({
            let (ask, waiting, mountpoint) = (self.ask, self.waiting.clone(), mountpoint.to_owned());
            let question = question.clone();
            move || {
                let answers = ask(&mountpoint);
                waiting.lock().expect("a thread died holding the probes").remove(&mountpoint);
                question.tell(answers);
            }
        });
        if spawned.is_err() {
            self.waiting.lock().expect("a thread died holding the probes").remove(mountpoint);
            question.tell(false);
        }
        question.wait()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use super::*;

    /// A scrape at the moment of the kubelet's question: both hear that a healthy mount is one.
    #[test]
    fn whoever_asks_while_another_waits_gets_the_same_answer() {
        static HANGS: AtomicBool = AtomicBool::new(true);
        static ASKED: AtomicUsize = AtomicUsize::new(0);
        fn ask(_: &Path) -> bool {
            ASKED.fetch_add(1, Ordering::SeqCst);
            while HANGS.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            }
            true
        }
        let probe = Probe { ask, wait: Duration::from_secs(600), ..Probe::default() };
        let until = Instant::now() + Duration::from_secs(120);
        // The map, the thread that asks at the mount, and each that waits.
        let sharing = |waiting: usize| {
            let of = |asked: &Arc<Question>| Arc::strong_count(asked) == 2 + waiting;
            while !probe.waiting.lock().expect("held").get(Path::new("/a")).is_some_and(of) {
                assert!(Instant::now() < until, "{waiting} do not wait");
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        std::thread::scope(|scope| {
            let first = scope.spawn(|| probe.answers(Path::new("/a")));
            sharing(1);
            let second = scope.spawn(|| probe.answers(Path::new("/a")));
            sharing(2);
            HANGS.store(false, Ordering::SeqCst);
            assert!(first.join().expect("asked") && second.join().expect("asked"));
        });
        assert_eq!(ASKED.load(Ordering::SeqCst), 1);
    }

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

//! Which programs are loading a model, told from what they opened and read: pure evidence for the open policy `auto`.
//!
//! In: opens and reads as they happen, by process. Out: a [`Reason`] why a file will be wanted whole, or none.
//! Promises: no reason from a program's first look at a file alone, so that listing, `file` and reading heads never cost
//! more than the chunks they touch; bounded, whatever the number of processes and files.
//! A reason is a guess about time: right or wrong, the bytes that readers get are the same.
//! Not here: holding opens (`fuse`), fetching (`cache`).

use std::num::NonZeroUsize;

use lru::LruCache;

/// Processes remembered at once; the least recently seen is forgotten.
const PROCESSES_MAX: NonZeroUsize = NonZeroUsize::new(512).expect("not zero");

/// Folders and files remembered for one process: the shards of a large model and then some.
const SEEN_MAX: usize = 512;

/// Bytes read behind the head before a reader is past it: what the kernel reads ahead of or around a head (1 MiB each
/// time) stays below, and so do the 7 MiB of either end by which file(1) judges.
pub const PAST_HEAD_BYTES: u64 = 24 << 20;

/// The share of a file that was read behind its head when the rest of it is fetched as well, one in so many. A reader
/// that has come so far has rarely stopped there.
const WALK_SHARE: u64 = 16;

/// Where the head of a file ends when nothing tells: more than all but vocabularies need.
const HEAD_BYTES_UNKNOWN: u64 = 1 << 20;

/// Why a file is expected to be read from end to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// This process, or its parent, read the folder's configuration or index first: how loaders begin.
    Configured,
    /// It has read large parts of another file of this folder.
    Sibling,
    /// It opened and read this very file before: a head was read, now the data is meant.
    Again,
    /// It was read whole at an earlier load (`--profile`).
    Profile,
}

/// Who opens: a process by its number, and the one that started it. 0: unknown, hence never remembered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Who {
    pub process: u32,
    pub parent: u32,
}

#[derive(Default)]
struct Process {
    /// Folders of which it read the configuration.
    configured: Vec<u64>,
    /// Folders of which it read large parts of a file.
    walked: Vec<u64>,
    /// Files it read something of.
    read: Vec<u64>,
}

/// What every process did lately.
pub struct Habits {
    processes: LruCache<u32, Process>,
}

impl Default for Habits {
    fn default() -> Self {
        Habits { processes: LruCache::new(PROCESSES_MAX) }
    }
}

fn note(list: &mut Vec<u64>, item: u64) {
    if list.contains(&item) {
        return;
    }
    if list.len() == SEEN_MAX {
        list.remove(0);
    }
    list.push(item);
}

impl Habits {
    fn of(&mut self, who: Who) -> Option<&mut Process> {
        (who.process != 0).then(|| self.processes.get_or_insert_mut(who.process, Process::default))
    }

    /// A file of `folder` was opened that tells how its weights are to be loaded ([`is_configuration`]).
    pub fn on_configuration(&mut self, who: Who, folder: u64) {
        if let Some(process) = self.of(who) {
            note(&mut process.configured, folder);
        }
    }

    /// Something of `file` was read through an open of this process.
    pub fn on_read(&mut self, who: Who, file: u64) {
        if let Some(process) = self.of(who) {
            note(&mut process.read, file);
        }
    }

    /// Large parts of a file of `folder` were read, or an open of it was held.
    pub fn on_walk(&mut self, who: Who, folder: u64) {
        if let Some(process) = self.of(who) {
            note(&mut process.walked, folder);
        }
    }

    /// Whether the open of `file` in `folder` is that of a program which will read all of it.
    pub fn reason(&mut self, who: Who, folder: u64, file: u64) -> Option<Reason> {
        let own = self.of(who)?;
        if own.read.contains(&file) {
            return Some(Reason::Again);
        }
        for process in [who.process, who.parent] {
            // Process 1 is everybody's parent in the end.
            let Some(process) = self.processes.peek(&process).filter(|_| process > 1) else { continue };
            if process.walked.contains(&folder) {
                return Some(Reason::Sibling);
            }
            if process.configured.contains(&folder) {
                return Some(Reason::Configured);
            }
        }
        None
    }
}

/// Whether a file of this name is what loaders read before they open the weights beside it.
pub fn is_configuration(name: &str) -> bool {
    name == "config.json" || name.ends_with(".index.json")
}

/// How far one open of one file has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Walk {
    past_head: u64,
    read_something: bool,
    told: bool,
}

/// What a read meant for the file as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The first bytes read through this open.
    First,
    /// So much has been read behind the head that the rest will be wanted. Said once an open.
    Whole,
    /// Nothing new.
    On,
}

impl Walk {
    /// Notes a read of `start..end` in a file of `size` bytes. `data_start`: where its head ends, if that is known.
    pub fn on_read(&mut self, start: u64, end: u64, size: u64, data_start: Option<u64>) -> Step {
        let data_start = data_start.unwrap_or(HEAD_BYTES_UNKNOWN).min(size);
        self.past_head += end.saturating_sub(start.max(data_start));
        let enough = PAST_HEAD_BYTES.max((size - data_start) / WALK_SHARE);
        if !self.told && self.past_head >= enough {
            self.told = true;
            self.read_something = true;
            return Step::Whole;
        }
        if std::mem::replace(&mut self.read_something, true) { Step::On } else { Step::First }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;
    const LOADER: Who = Who { process: 100, parent: 50 };

    #[test]
    fn a_first_look_at_any_number_of_files_is_no_reason() {
        let mut habits = Habits::default();
        for file in 0..1000 {
            assert_eq!(habits.reason(LOADER, 7, file), None, "file {file}");
            habits.on_read(LOADER, file);
        }
    }

    #[test]
    fn reading_the_configuration_first_is_a_reason_for_that_folder_and_process_family_only() {
        let mut habits = Habits::default();
        habits.on_configuration(LOADER, 7);
        assert_eq!(habits.reason(LOADER, 7, 1), Some(Reason::Configured));
        assert_eq!(habits.reason(LOADER, 8, 1), None);
        assert_eq!(habits.reason(Who { process: 200, parent: 50 }, 7, 1), None, "a stranger");
        assert_eq!(habits.reason(Who { process: 201, parent: 100 }, 7, 1), Some(Reason::Configured), "a worker");
    }

    #[test]
    fn a_file_opened_again_after_its_head_was_read_is_meant_whole() {
        let mut habits = Habits::default();
        habits.on_read(LOADER, 1);
        assert_eq!(habits.reason(LOADER, 7, 1), Some(Reason::Again));
        assert_eq!(habits.reason(LOADER, 7, 2), None, "another file");
        assert_eq!(habits.reason(Who { process: 101, parent: 100 }, 7, 1), None, "another process looks for itself");
    }

    #[test]
    fn the_shards_beside_one_that_was_read_are_wanted_whole() {
        let mut habits = Habits::default();
        habits.on_walk(LOADER, 7);
        assert_eq!(habits.reason(LOADER, 7, 2), Some(Reason::Sibling));
        assert_eq!(habits.reason(LOADER, 9, 3), None);
    }

    #[test]
    fn what_is_remembered_is_bounded_and_unknown_processes_are_nobody() {
        let mut habits = Habits::default();
        habits.on_configuration(Who::default(), 7);
        assert_eq!(habits.reason(Who::default(), 7, 1), None);
        habits.on_configuration(Who { process: 1, parent: 0 }, 7);
        assert_eq!(habits.reason(Who { process: 300, parent: 1 }, 7, 1), None, "process 1 is everybody's parent");
        for process in 2..10_000 {
            for file in 0..3 * SEEN_MAX as u64 {
                if process % 1000 == 2 || file < 3 {
                    habits.on_read(Who { process, parent: 1 }, file);
                }
            }
        }
        assert_eq!(habits.processes.len(), PROCESSES_MAX.get());
        assert!(habits.processes.iter().all(|(_, process)| process.read.len() <= SEEN_MAX));
    }

    #[test]
    fn a_head_and_what_the_kernel_reads_around_it_is_no_walk() {
        let mut walk = Walk::default();
        assert_eq!(walk.on_read(0, MIB, 10 * GIB, Some(100_000)), Step::First);
        assert_eq!(walk.on_read(MIB, 2 * MIB, 10 * GIB, Some(100_000)), Step::On);
        // The end of the file as well, where zip archives keep their index.
        assert_eq!(walk.on_read(10 * GIB - MIB, 10 * GIB, 10 * GIB, Some(100_000)), Step::On);
    }

    #[test]
    fn a_walk_behind_the_head_is_told_once_and_the_head_does_not_count() {
        let mut walk = Walk::default();
        let head = 64 * MIB;
        for at in (0..head).step_by(MIB as usize) {
            assert_ne!(walk.on_read(at, at + MIB, GIB, Some(head)), Step::Whole, "at {at}");
        }
        let told: Vec<u64> = (head..GIB)
            .step_by(MIB as usize)
            .filter(|&at| walk.on_read(at, at + MIB, GIB, Some(head)) == Step::Whole)
            .collect();
        assert_eq!(told, [head + (GIB - head) / WALK_SHARE - MIB]);
    }

    #[test]
    fn a_file_of_a_few_megabytes_is_walked_by_its_end() {
        for (size, wanted) in [(28 * MIB, 1), (16 * MIB, 0)] {
            let mut walk = Walk::default();
            let reads = (0..size).step_by(MIB as usize);
            let told = reads.filter(|at| walk.on_read(*at, at + MIB, size, None) == Step::Whole).count();
            assert_eq!(told, wanted, "a file that is soon read anyway needs no telling: {size}");
        }
    }
}

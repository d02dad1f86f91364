//! A random marker, and where it is: the detector of the tests that plaintext is nowhere.
#![allow(dead_code)] // each test binary uses its own part

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

pub const MARKER_BYTES: usize = 64;

/// Horspool: with a random needle of 64 bytes it looks at about one byte in 64.
pub struct Needle {
    bytes: [u8; MARKER_BYTES],
    skip: [usize; 256],
}

impl Needle {
    pub fn new(bytes: [u8; MARKER_BYTES]) -> Needle {
        let mut skip = [MARKER_BYTES; 256];
        for (i, byte) in bytes[..MARKER_BYTES - 1].iter().enumerate() {
            skip[usize::from(*byte)] = MARKER_BYTES - 1 - i;
        }
        Needle { bytes, skip }
    }

    pub fn is_in(&self, hay: &[u8]) -> bool {
        let mut at = 0;
        while at + MARKER_BYTES <= hay.len() {
            if hay[at..at + MARKER_BYTES] == self.bytes {
                return true;
            }
            at += self.skip[usize::from(hay[at + MARKER_BYTES - 1])];
        }
        false
    }

    /// Searches a file or device from end to end. What vanishes or cannot be read meanwhile holds nothing.
    pub fn is_in_file(&self, path: &Path) -> bool {
        let Ok(mut file) = File::open(path) else { return false };
        let mut window = vec![0; 4 << 20];
        let mut kept = 0;
        loop {
            let Ok(got) = file.read(&mut window[kept..]) else { return false };
            if got == 0 {
                return false;
            }
            let filled = kept + got;
            if self.is_in(&window[..filled]) {
                return true;
            }
            // A marker may lie across two reads.
            kept = filled.min(MARKER_BYTES - 1);
            window.copy_within(filled - kept..filled, 0);
        }
    }

    /// The mappings of a process that hold the marker, as its /proc shows them: all that it can read itself, secret memory
    /// excepted, which nobody can.
    pub fn in_memory_of(&self, pid: u32) -> Vec<String> {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).expect("maps");
        let memory = File::open(format!("/proc/{pid}/mem")).expect("only root may look into a daemon");
        let mut window = vec![0; 4 << 20];
        let mut found = Vec::new();
        for line in maps.lines() {
            let (range, rest) = line.split_once(' ').expect("a range");
            let (start, end) = range.split_once('-').expect("a range");
            let number = |text| u64::from_str_radix(text, 16).expect("hex");
            let (mut at, end) = (number(start), number(end));
            // The kernel's own pages at the end of the addresses are no memory of the process.
            if !rest.starts_with('r') || end > i64::MAX as u64 {
                continue;
            }
            let mut kept = 0;
            while at < end {
                let want = (window.len() - kept).min((end - at) as usize);
                match memory.read_at(&mut window[kept..kept + want], at) {
                    Ok(got) if got > 0 => {
                        at += got as u64;
                        let filled = kept + got;
                        if self.is_in(&window[..filled]) {
                            found.push(line.to_owned());
                            break;
                        }
                        kept = filled.min(MARKER_BYTES - 1);
                        window.copy_within(filled - kept..filled, 0);
                    }
                    // Not there, or not to be looked at: the next page may be.
                    _ => (at, kept) = (at + 4096, 0),
                }
            }
        }
        found
    }
}

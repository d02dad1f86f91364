//! Takes a secret out of the environment so that nobody can read it there any more.
//!
//! In: a variable's name. Out: its value in a [`LockedBuf`]; the entry is overwritten where the kernel put it, which is
//! what /proc/PID/environ shows for the life of the process (`unsetenv` leaves it there), and where this process put it.
//! Promises: after [`take_env`] neither the variable nor its value is in the environment block or in the C library's list.
//! Held by: `a_taken_variable_is_gone_from_proc_environ` in tests/memory.rs, tests/secrets.rs.

use std::ffi::CStr;
use std::ops::Range;

use super::map::wipe_raw;
use super::secret::LockedBuf;
use crate::error::Result;

/// The value of `name`, taken out of the environment; `None` if it is not there (or was taken before). Empty is `Some`.
///
/// Every entry of that name is overwritten, name and value, whether the kernel put it there or this process (`env-file` of
/// fstab). To be called at start, before other threads read the environment: they would see a value that ends early.
///
/// # Errors
/// `Code::Memlock` if the value cannot be locked; the environment is then unchanged.
pub fn take_env(name: &str) -> Result<Option<LockedBuf>> {
    let mut found = environment_block().map(|block| entries(block, name)).unwrap_or_default();
    each_listed(|entry| {
        let (start, bytes) = (entry.as_ptr().expose_provenance(), entry.to_bytes());
        if is_entry_of(name, bytes) && !found.iter().any(|seen| seen.start == start) {
            found.push(start..start + bytes.len());
        }
    });
    let mut taken = None;
    for entry in found {
        let value = entry.start + name.len() + 1..entry.end;
        // SAFETY: the range lies in the block the kernel filled at exec, mapped writable for the process's life, or in what
        // setenv(3) allocated for the list and keeps there.
        let bytes =
            unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance::<u8>(value.start), value.len()) };
        if taken.is_none() {
            taken = Some(LockedBuf::copy_of(bytes)?);
        }
        // SAFETY: as above; the whole entry.
        unsafe { wipe_raw(std::ptr::with_exposed_provenance_mut(entry.start), entry.len()) };
    }
    Ok(taken)
}

/// Whether `name` is set to something. Its value is looked at where it lies and not copied.
pub fn is_env_set(name: &str) -> bool {
    let mut set = false;
    each_listed(|entry| {
        let bytes = entry.to_bytes();
        set |= is_entry_of(name, bytes) && bytes.len() > name.len() + 1;
    });
    set
}

/// The names that are set. No value is copied: some of them are secrets.
///
/// To be called at start, before other threads change the environment.
pub fn env_names() -> Vec<String> {
    let mut names = Vec::new();
    each_listed(|entry| {
        let name = entry.to_bytes().split(|byte| *byte == b'=').next().unwrap_or_default();
        if !name.is_empty() {
            names.push(String::from_utf8_lossy(name).into_owned());
        }
    });
    names
}

/// Every entry of the C library's own list: what the kernel gave, and what this process set.
fn each_listed(mut look: impl FnMut(&CStr)) {
    unsafe extern "C" {
        static environ: *const *const libc::c_char;
    }
    // SAFETY: the C library's own list; nobody changes it while this process has one thread.
    let mut entry = unsafe { environ };
    // SAFETY: a list of C strings that ends with a null pointer, as environ(7) has it.
    while !entry.is_null() && unsafe { !(*entry).is_null() } {
        // SAFETY: not null, as was asked on the line before.
        look(unsafe { CStr::from_ptr(*entry) });
        // SAFETY: the list goes on until its null pointer.
        entry = unsafe { entry.add(1) };
    }
}

fn is_entry_of(name: &str, entry: &[u8]) -> bool {
    !name.is_empty() && entry.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.first() == Some(&b'='))
}

/// Addresses of the entries `NAME=value` (without their NUL) of `name` in the block.
fn entries(block: Range<usize>, name: &str) -> Vec<Range<usize>> {
    // SAFETY: the block is mapped for the process's life, and this slice ends before anyone writes to it.
    let bytes =
        unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance::<u8>(block.start), block.len()) };
    let mut found = Vec::new();
    let mut start = 0;
    for entry in bytes.split(|byte| *byte == 0) {
        if is_entry_of(name, entry) {
            found.push(block.start + start..block.start + start + entry.len());
        }
        start += entry.len() + 1;
    }
    found
}

/// Where the kernel put the environment at exec: fields env_start and env_end of /proc/self/stat (proc(5), 50 and 51).
fn environment_block() -> Option<Range<usize>> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The command's name, field 2, may hold spaces and parentheses: count from behind its last one.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(47);
    let start: usize = fields.next()?.parse().ok()?;
    let end: usize = fields.next()?.parse().ok()?;
    (start != 0 && start < end).then_some(start..end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_that_is_set_is_told_and_no_value() {
        let names = env_names();
        for (name, value) in std::env::vars() {
            assert!(names.contains(&name), "{name}");
            assert!(value.len() < 16 || !names.contains(&value), "a value of {name}");
        }
        assert_eq!(names.len(), std::env::vars_os().count());
    }

    #[test]
    fn the_environment_block_is_where_the_kernel_says() {
        let block = environment_block().unwrap();
        let (name, _) = std::env::vars().find(|(name, _)| name == "PATH" || name == "HOME").unwrap();
        assert_eq!(entries(block.clone(), &name).len(), 1);
        assert!(is_env_set(&name));
        assert_eq!(entries(block, "").len(), 0);
    }

    #[test]
    fn a_variable_that_is_not_there_is_none() {
        assert!(take_env("MODELFS_NO_SUCH_VARIABLE").unwrap().is_none());
        assert!(!is_env_set("MODELFS_NO_SUCH_VARIABLE") && !is_env_set(""));
    }
}

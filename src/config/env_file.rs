//! `env-file=PATH` of fstab: variables for a mount that starts with no environment of its own, as at boot.
//!
//! Promises: only the owner can read the file, or it is refused; only variables that modelfs reads are taken; nothing of
//! a value is in an error; all of the file counts, or none of it.
//! Held by: the tests below, tests/mount8.sh.

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use crate::error::{Code, Error, Result};
use crate::mem::LockedBuf;
use crate::refuse;

const FILE_BYTES_MAX: usize = 64 << 10;

/// What modelfs and its storage client read; nothing that changes how the program itself runs.
const PREFIXES: [&str; 4] = ["AWS_", "MODELFS_", "MODEL_ENCRYPTION_", "VAULT_"];

/// The file in locked memory, and where names and values lie in it.
#[derive(Debug)]
pub struct EnvFile {
    text: LockedBuf,
    variables: Vec<Variable>,
}

#[derive(Debug, PartialEq, Eq)]
struct Variable {
    name: Range<usize>,
    value: Range<usize>,
}

impl EnvFile {
    /// Name and value of each line, borrowed where they lie.
    pub fn variables(&self) -> impl Iterator<Item = (&str, &str)> {
        // The whole file was text when it was read, and lines are cut between its characters.
        let text = std::str::from_utf8(&self.text).expect("checked when it was read");
        self.variables.iter().map(|one| (&text[one.name.clone()], &text[one.value.clone()]))
    }
}

/// Lines `NAME=VALUE`; empty lines and those after `#` or `;` are comments, quotes around a value go.
pub fn read(path: &Path) -> Result<EnvFile> {
    let named = |what: &str| format!("the environment file {} {what}", path.display());
    let unread = |e| Error::new(Code::Usage, named("cannot be read")).with_source(e);
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path);
    let mut file = file.map_err(unread)?;
    // The open file is asked, not the path: the path may lead elsewhere by now.
    let meta = file.metadata().map_err(|e| Error::new(Code::Usage, named("cannot be looked at")).with_source(e))?;
    // SAFETY: geteuid only reads this process's credentials.
    let own_uid = unsafe { libc::geteuid() };
    if !meta.is_file() || meta.mode() & 0o077 != 0 || !(meta.uid() == 0 || meta.uid() == own_uid) {
        refuse!(
            KeyPerms,
            "{}",
            named("holds secrets: it must belong to you or root, and be closed to others (chmod 600)")
        );
    }
    let size = usize::try_from(meta.len()).ok().filter(|size| *size <= FILE_BYTES_MAX);
    let Some(size) = size else { refuse!(Usage, "{}", named("is longer than 64 KiB")) };
    // One byte more than it has: a file that grew since is not cut off.
    let mut text = LockedBuf::new(size + 1)?;
    let mut len = 0;
    while len < text.len() {
        match file.read(&mut text[len..]).map_err(unread)? {
            0 => break,
            more => len += more,
        }
    }
    if len > size {
        refuse!(Usage, "{}", named("grew while it was read; start again"));
    }
    text.truncate(len);
    let variables = match std::str::from_utf8(&text) {
        Ok(text) => parse(text).map_err(|e| e.context(named("is refused")))?,
        Err(_) => refuse!(Usage, "{}", named("is not text in UTF-8")),
    };
    Ok(EnvFile { text, variables })
}

fn parse(text: &str) -> Result<Vec<Variable>> {
    let mut variables = Vec::new();
    // Every piece is a part of `text`: where it begins is how far it lies from there.
    let place = |piece: &str| {
        let start = piece.as_ptr().addr() - text.as_ptr().addr();
        start..start + piece.len()
    };
    for (at, line) in text.lines().enumerate() {
        let (number, line) = (at + 1, line.trim());
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        // The line may be a secret in the wrong place: it is not repeated.
        let Some((name, value)) = line.split_once('=') else { refuse!(Usage, "line {number} is not NAME=VALUE") };
        let legal = name.bytes().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == b'_');
        if !legal || !PREFIXES.iter().any(|prefix| name.starts_with(prefix)) {
            refuse!(Usage, "line {number} sets no variable of AWS_, VAULT_ or MODELFS_");
        }
        let bare = ['"', '\''].iter().find_map(|quote| value.strip_prefix(*quote)?.strip_suffix(*quote));
        let value = bare.unwrap_or(value);
        if value.contains('\0') {
            refuse!(Usage, "line {number} has a zero byte in it");
        }
        variables.push(Variable { name: place(name), value: place(value) });
    }
    Ok(variables)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn lines_are_variables_comments_or_refused_without_being_repeated() {
        let text = "# S3\n\nAWS_ACCESS_KEY_ID=ak\n; more\nAWS_SECRET_ACCESS_KEY=\"a b=c\"\nMODELFS_CACHE='1GiB'\n";
        let variables = parse(text).expect("legal");
        let read = EnvFile { text: LockedBuf::copy_of(text.as_bytes()).expect("locked"), variables };
        assert!(!format!("{read:?}").contains("a b=c"), "{read:?}");
        let plain: Vec<(&str, &str)> = read.variables().collect();
        assert_eq!(plain, [("AWS_ACCESS_KEY_ID", "ak"), ("AWS_SECRET_ACCESS_KEY", "a b=c"), ("MODELFS_CACHE", "1GiB")]);
        for text in
            ["s3cr3t", "LD_PRELOAD=/s3cr3t", "PATH=s3cr3t", "export AWS_X=s3cr3t", "aws_x=s3cr3t", "VAULT_=\0s3cr3t"]
        {
            let err = parse(&format!("AWS_REGION=x\n{text}\n")).expect_err(text);
            assert!(err.chain().contains("line 2") && !err.chain().contains("s3cr3t"), "{err:?}");
        }
    }

    #[test]
    fn a_file_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("env");
        std::fs::write(&path, "AWS_REGION=x\n").expect("written");
        for (mode, opens) in [(0o600, true), (0o640, false), (0o604, false), (0o400, true)] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("mode");
            assert_eq!(read(&path).is_ok(), opens, "{mode:o}");
        }
        assert_eq!(read(dir.path()).expect_err("a folder").code(), Code::KeyPerms);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("mode");
        for (bytes, why) in [(vec![b'#'; FILE_BYTES_MAX + 1], "64 KiB"), (b"AWS_X=\xff".to_vec(), "UTF-8")] {
            std::fs::write(&path, bytes).expect("written");
            assert!(read(&path).expect_err(why).chain().contains(why));
        }
        assert_eq!(read(&dir.path().join("none")).expect_err("nothing").code(), Code::Usage);
    }
}

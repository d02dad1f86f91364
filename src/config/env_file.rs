//! `env-file=PATH` of fstab: variables for a mount that starts with no environment of its own, as at boot.
//!
//! Promises: only the owner can read the file, or it is refused; only variables that modelfs reads are taken; nothing of
//! a value is in an error; all of the file counts, or none of it.
//! Held by: the tests below, tests/mount8.sh.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use zeroize::Zeroizing;

use crate::error::{Code, Error, Result};
use crate::refuse;

const FILE_BYTES_MAX: u64 = 64 << 10;

/// What modelfs and its storage client read; nothing that changes how the program itself runs.
const PREFIXES: [&str; 4] = ["AWS_", "MODELFS_", "MODEL_ENCRYPTION_", "VAULT_"];

/// Name and value of each line `NAME=VALUE`; empty lines and those after `#` or `;` are comments, quotes around a value go.
pub fn read(path: &Path) -> Result<Vec<(String, Zeroizing<String>)>> {
    let named = |what: &str| format!("the environment file {} {what}", path.display());
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path);
    let file = file.map_err(|e| Error::new(Code::Usage, named("cannot be read")).with_source(e))?;
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
    let mut text = Zeroizing::new(String::with_capacity(FILE_BYTES_MAX as usize + 1));
    file.take(FILE_BYTES_MAX + 1)
        .read_to_string(&mut text)
        .map_err(|e| Error::new(Code::Usage, named("cannot be read")).with_source(e))?;
    if text.len() as u64 > FILE_BYTES_MAX {
        refuse!(Usage, "{}", named("is longer than 64 KiB"));
    }
    parse(&text).map_err(|e| e.context(named("is refused")))
}

fn parse(text: &str) -> Result<Vec<(String, Zeroizing<String>)>> {
    let mut variables = Vec::new();
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
        variables.push((name.to_owned(), Zeroizing::new(value.to_owned())));
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
        let plain: Vec<(&str, &str)> = variables.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
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
        assert_eq!(read(&dir.path().join("none")).expect_err("nothing").code(), Code::Usage);
    }
}

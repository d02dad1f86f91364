//! `modelfs install-helper`: the links by which mount(8) finds this program.
//!
//! Promises: what is not ours is neither overwritten nor removed; a second run changes nothing; a link is replaced in one
//! step, so that mount(8) finds the old one or the new one.
//! Held by: the tests below, tests/mount8.sh.

use std::io;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::{Out, mount_helper};
use crate::error::{Code, Error, Result};
use crate::refuse;

/// Let mount(8) and fstab mount: link this program as /sbin/mount.modelfs.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct InstallHelperArgs {
    /// Make the links in DIR/sbin instead of /sbin, where mount(8) looks
    #[arg(long, value_name = "DIR")]
    prefix: Option<PathBuf>,
    /// Remove the links
    #[arg(long)]
    remove: bool,
}

const EXAMPLES: &str = "\
Examples:
  sudo modelfs install-helper
  sudo modelfs install-helper --remove
  modelfs install-helper --prefix ./image                  for the root folder of another system

Then:
  mount -t modelfs s3://models/prod /mnt/models \\
      -o ro,key=file:/etc/modelfs/llama.key,trust=PUBKEY

The Debian package brings these links. mount.fuse.modelfs is for the type as the mount table shows it (fuse.modelfs).";

/// What became of one link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Done {
    Made,
    Kept,
    Replaced,
    Removed,
    Absent,
}

impl Done {
    fn name(self) -> &'static str {
        match self {
            Done::Made => "made",
            Done::Kept => "kept",
            Done::Replaced => "replaced",
            Done::Removed => "removed",
            Done::Absent => "absent",
        }
    }
}

pub fn run(args: &InstallHelperArgs, out: &Out) -> Result<()> {
    let program = std::env::current_exe()
        .map_err(|e| Error::new(Code::Host, "cannot find the path of this program").with_source(e))?;
    let folder = args.prefix.as_deref().unwrap_or(Path::new("/")).join("sbin");
    let done = install(&program, &folder, args.remove)?;
    let warning = if args.remove { None } else { replaceable_by(&program) };
    let links: Vec<_> = done.iter().map(|(path, done)| json!({"path": path, "done": done.name()})).collect();
    out.result(&json!({"program": program, "links": links, "warning": warning}), || {
        if out.quiet {
            return String::new();
        }
        let line = |(path, done): &(PathBuf, Done)| {
            let (path, program) = (path.display(), program.display());
            match done {
                Done::Made => format!("made {path}, a link to {program}\n"),
                Done::Kept => format!("{path} leads to {program} already\n"),
                Done::Replaced => format!("{path} now leads to {program}\n"),
                Done::Removed => format!("removed {path}\n"),
                Done::Absent => format!("{path} is not there\n"),
            }
        };
        done.iter().map(line).collect()
    })?;
    if let Some(warning) = warning {
        out.hint(warning);
    }
    Ok(())
}

/// All links or none: what is foreign is found before anything is touched.
fn install(program: &Path, folder: &Path, remove: bool) -> Result<Vec<(PathBuf, Done)>> {
    let paths = mount_helper::NAMES.map(|name| folder.join(name));
    let mut seen = Vec::new();
    for path in &paths {
        seen.push(link_of_ours(path)?);
    }
    if !remove {
        std::fs::create_dir_all(folder).map_err(|e| cannot("make", folder, e))?;
    }
    let mut done = Vec::new();
    for (path, target) in paths.into_iter().zip(seen) {
        let what = match (remove, target) {
            (true, None) => Done::Absent,
            (true, Some(_)) => {
                std::fs::remove_file(&path).map_err(|e| cannot("remove", &path, e))?;
                Done::Removed
            }
            (false, None) => {
                symlink(program, &path).map_err(|e| cannot("make", &path, e))?;
                Done::Made
            }
            (false, Some(target)) if leads_to(&path, &target, program) => Done::Kept,
            (false, Some(_)) => {
                replace(program, &path).map_err(|e| cannot("replace", &path, e))?;
                Done::Replaced
            }
        };
        done.push((path, what));
    }
    Ok(done)
}

/// What the link at `path` says; `None` if nothing is there. A link is ours if it leads to something called modelfs.
fn link_of_ours(path: &Path) -> Result<Option<PathBuf>> {
    match std::fs::read_link(path) {
        Ok(target) if target.file_name().is_some_and(|name| name == "modelfs") => Ok(Some(target)),
        Ok(target) => {
            refuse!(Usage, "{} is a link to {}, not to modelfs; move it away first", path.display(), target.display())
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) if e.kind() == io::ErrorKind::InvalidInput => {
            refuse!(Usage, "{} is there and is no link of modelfs; move it away first", path.display())
        }
        Err(e) => Err(cannot("read", path, e)),
    }
}

/// By its words or through other links, as a package's relative link.
fn leads_to(link: &Path, target: &Path, program: &Path) -> bool {
    target == program || std::fs::canonicalize(link).is_ok_and(|real| real == program)
}

fn replace(program: &Path, path: &Path) -> io::Result<()> {
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(format!(".{}", std::process::id()));
    symlink(program, &fresh)?;
    std::fs::rename(&fresh, path).inspect_err(|_| drop(std::fs::remove_file(&fresh)))
}

fn cannot(what: &str, path: &Path, error: io::Error) -> Error {
    let hint = if error.kind() == io::ErrorKind::PermissionDenied { "; run it as root, or give --prefix" } else { "" };
    Error::new(Code::Host, format!("cannot {what} {}{hint}", path.display())).with_source(error)
}

/// mount(8) runs the program as root: who else could put another one in its place?
fn replaceable_by(program: &Path) -> Option<String> {
    program.ancestors().find_map(|place| {
        let meta = std::fs::metadata(place).ok()?;
        // In a folder with the sticky bit only the owner replaces a file.
        let open = meta.mode() & 0o022 != 0 && meta.mode() & 0o1000 == 0;
        (open || meta.uid() != 0).then(|| {
            format!(
                "mount(8) runs this program as root, and others than root can change {}; \
                 put modelfs where only root writes, as in /usr/local/bin",
                place.display()
            )
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(done: &[(PathBuf, Done)]) -> Vec<Done> {
        done.iter().map(|(_, done)| *done).collect()
    }

    #[test]
    fn links_are_made_kept_replaced_and_removed() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let sbin = dir.path().join("sbin");
        let [old, new] = ["old/modelfs", "new/modelfs"].map(|name| dir.path().join(name));
        let go = |program: &Path, remove| made(&install(program, &sbin, remove).expect("allowed"));
        assert_eq!(go(&old, false), [Done::Made; 2]);
        assert_eq!(go(&old, false), [Done::Kept; 2]);
        assert_eq!(go(&new, false), [Done::Replaced; 2]);
        assert_eq!(std::fs::read_link(sbin.join("mount.modelfs")).expect("a link"), new);
        assert_eq!(std::fs::read_dir(&sbin).expect("listed").count(), 2);
        assert_eq!(go(&old, true), [Done::Removed; 2]);
        assert_eq!(go(&old, true), [Done::Absent; 2]);
    }

    #[test]
    fn a_relative_link_to_this_program_is_kept() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let dir = dir.path().canonicalize().expect("there");
        for folder in ["bin", "sbin"] {
            std::fs::create_dir(dir.join(folder)).expect("made");
        }
        std::fs::write(dir.join("bin/modelfs"), "").expect("written");
        for name in mount_helper::NAMES {
            symlink("../bin/modelfs", dir.join("sbin").join(name)).expect("linked");
        }
        let done = install(&dir.join("bin/modelfs"), &dir.join("sbin"), false).expect("allowed");
        assert_eq!(made(&done), [Done::Kept; 2]);
    }

    /// The second name is foreign: the first is not touched either.
    #[test]
    fn a_foreign_file_or_link_stays_and_nothing_is_done() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let program = dir.path().join("modelfs");
        for foreign in ["file", "link"] {
            let sbin = dir.path().join(foreign);
            std::fs::create_dir(&sbin).expect("made");
            let path = sbin.join("mount.fuse.modelfs");
            match foreign {
                "file" => std::fs::write(&path, "#!/bin/sh\n").expect("written"),
                _ => symlink("/usr/bin/sshfs", &path).expect("linked"),
            }
            for remove in [false, true] {
                let err = install(&program, &sbin, remove).expect_err("refused");
                assert_eq!(err.code(), Code::Usage);
                assert!(err.chain().contains("move it away"), "{err:?}");
            }
            assert!(path.symlink_metadata().is_ok() && !sbin.join("mount.modelfs").is_symlink());
        }
    }
}

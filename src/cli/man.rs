//! `modelfs man`: the manual, one page a command, from the command line's own definition.
//!
//! In: clap's [`Command`] and the option table of `config::layers`. Out: roff, the same bytes on every machine.
//! Promises: every option on a page exists, and every option that exists is on its page.
//! Held by: the tests below, tests/package.sh.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use clap::{Args, Command, CommandFactory};
use clap_mangen::Man;
use serde_json::json;

use super::flags::help;
use super::{Cli, Out};
use crate::config::layers::{Kind, MOUNT_WORDS, OPTIONS, options_of_a_mount};
use crate::config::names::{Does, OTHERS, OWN, OtherName};
use crate::error::{Class, Code, Error, Result};

/// Write the manual pages: one a command, and mount.modelfs(8).
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ManArgs {
    /// Where man1 and man8 are made [default: print modelfs(1)]
    dir: Option<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  modelfs man | man -l -
  sudo modelfs man /usr/local/share/man      then: man modelfs-mount, man mount.modelfs

The Debian package brings them.";

/// A page: its name without the section, the section, its text.
struct Page {
    name: String,
    section: &'static str,
    text: String,
}

pub fn run(args: &ManArgs, out: &Out) -> Result<()> {
    let pages = pages();
    let Some(dir) = &args.dir else {
        let first = pages.iter().find(|page| page.name == "modelfs").expect("the top page is always made");
        return out.result(&json!({ "page": first.text }), || first.text.clone());
    };
    let mut written = Vec::new();
    for page in &pages {
        written.push(write(dir, page)?);
    }
    out.result(&json!({ "pages": written }), || {
        if out.quiet { String::new() } else { format!("{} pages in {}", written.len(), dir.display()) }
    })
}

fn write(dir: &Path, page: &Page) -> Result<PathBuf> {
    let folder = dir.join(format!("man{}", page.section));
    let path = folder.join(format!("{}.{}", page.name, page.section));
    std::fs::create_dir_all(&folder)
        .and_then(|()| std::fs::write(&path, &page.text))
        .map_err(|e| Error::new(Code::Host, format!("cannot write {}", path.display())).with_source(e))?;
    Ok(path)
}

fn pages() -> Vec<Page> {
    let mut top = Cli::command().disable_help_subcommand(true);
    top.build();
    let mut pages = Vec::new();
    collect(&top, &top, &mut pages);
    pages.push(helper_page());
    // The other name of the helper leads to the same page.
    pages.push(Page { name: "mount.fuse.modelfs".into(), section: "8", text: ".so man8/mount.modelfs.8\n".into() });
    pages
}

fn collect(command: &Command, top: &Command, pages: &mut Vec<Page>) {
    pages.push(command_page(command, top));
    for inner in command.get_subcommands().filter(|inner| !inner.is_hide_set()) {
        collect(inner, top, pages);
    }
}

fn command_page(command: &Command, top: &Command) -> Page {
    let name = command.get_display_name().unwrap_or_else(|| command.get_name()).to_owned();
    let man = Man::new(command.clone())
        .title(name.to_uppercase())
        .manual("modelfs manual")
        .source(concat!("modelfs ", env!("CARGO_PKG_VERSION")));
    let mut drawn = Vec::new();
    let parts = [
        Man::render_title,
        Man::render_name_section,
        Man::render_synopsis_section,
        Man::render_description_section,
        Man::render_options_section,
    ];
    for part in parts {
        part(&man, &mut drawn).expect("writing to memory cannot fail");
    }
    if command.has_subcommands() {
        man.render_subcommands_section(&mut drawn).expect("writing to memory cannot fail");
    }
    let mut text = String::from_utf8(drawn).expect("made of our own words");
    if let Some(help) = command.get_after_help() {
        let help = help.to_string();
        section(&mut text, "EXAMPLES");
        examples(&mut text, help.strip_prefix("Examples:\n").unwrap_or(&help));
    }
    exit_status(&mut text);
    // Whom an audit log's checkpoints are trusted by, and of which model records are shown, is said in words alone.
    let of_audit = name.starts_with("modelfs-audit");
    let takes = |option: &str| command.get_arguments().any(|arg| arg.get_long() == Some(option));
    environment(&mut text, |option| if of_audit { option == "audit-file" } else { takes(option) });
    files(&mut text);
    let inner = command.get_subcommands().filter_map(|inner| inner.get_display_name().map(|name| (name, "1")));
    let mut also: Vec<(&str, &str)> = inner.collect();
    if name != top.get_name() {
        also.push(("modelfs", "1"));
    }
    also.push(("mount.modelfs", "8"));
    see_also(&mut text, &also);
    Page { name, section: "1", text }
}

/// mount.modelfs(8): the table of options, each with what `modelfs mount --help` says of its flag.
fn helper_page() -> Page {
    let mut text = String::new();
    let _ = writeln!(text, ".TH MOUNT.MODELFS 8 \"\" \"modelfs {}\" \"modelfs manual\"", env!("CARGO_PKG_VERSION"));
    section(&mut text, "NAME");
    text.push_str("mount.modelfs \\- mount encrypted models from object storage by mount(8) or fstab\n");
    section(&mut text, "SYNOPSIS");
    text.push_str(
        "\\fBmount \\-t modelfs\\fR \\fISTORE\\fR \\fIMOUNTPOINT\\fR [\\fB\\-o\\fR \\fIOPTIONS\\fR]\n.br\n\
         \\fBmount.modelfs\\fR \\fISTORE\\fR \\fIMOUNTPOINT\\fR [\\fB\\-sfnv\\fR] [\\fB\\-N\\fR \\fINAMESPACE\\fR] \
         [\\fB\\-o\\fR \\fIOPTIONS\\fR]\n",
    );
    section(&mut text, "DESCRIPTION");
    paragraphs(
        &mut text,
        &[
            "mount(8), fstab and systemd call it; it returns when the models can be read, or with one line of standard \
             error and no mount. A daemon stays until umount(8) or `modelfs umount`. STORE is a path, file:///PATH, \
             s3://BUCKET/PREFIX or vault-kv://MOUNT/PATH.",
            "An option of fstab is an option of modelfs-mount(1) without its dashes: cache=8GiB; `_` and `-` are the \
             same. A switch stands alone or with =true or =false. A comma within a value is written as \\, or the value in \
             double quotes. An option not given here comes from the environment or the configuration file.",
            "A key is named, never written: key=file:PATH. What is on a command line or in fstab can be read by others.",
            "The filesystem is always ro, nosuid, nodev and noexec. rw, suid, dev and exec are answered with a warning. \
             Without allow_other nobody but the user who mounts can enter, not even root.",
            "remount changes nothing: it succeeds if it asks for nothing new (as `remount,ro`), else it fails and says \
             what it was asked for.",
            "With -N, the daemon lives in that mount namespace: mountpoint, key files and local stores are looked for in its \
             tree.",
        ],
    );
    section(&mut text, "OPTIONS");
    for option in options_of_a_mount() {
        let value = match option.kind {
            Kind::Switch => String::new(),
            Kind::One | Kind::Many => format!("=\\fI{}\\fR", roff(option.word)),
        };
        let _ = writeln!(text, ".TP\n\\fB{}\\fR{value}", roff(option.name));
        line(&mut text, &help(option));
    }
    section(&mut text, "OPTIONS OF THE HELPER");
    let _ = writeln!(text, ".TP\n\\fBenv\\-file\\fR=\\fIPATH\\fR");
    line(
        &mut text,
        "Variables for this mount, one NAME=VALUE a line, as AWS_ACCESS_KEY_ID=...; only AWS_, VAULT_ and MODELFS_ names. At boot \
         there is no other environment. The file must be closed to others (chmod 600).",
    );
    section(&mut text, "OPTIONS OF MOUNT");
    paragraphs(
        &mut text,
        &[
            "These are for mount(8), fstab and systemd, and passed over here, as is every word that begins with x- or X-. \
             Write _netdev for a store on the network: systemd then waits for it. An unknown word is refused, unless -s \
             is given.",
            &MOUNT_WORDS.join(", "),
        ],
    );
    section(&mut text, "EXAMPLES");
    verbatim(
        &mut text,
        "mount -t modelfs s3://models/prod /mnt/models -o ro,key=file:/etc/modelfs/llama.key,trust=PUBKEY,cache=64GiB\n\n\
         # /etc/fstab\n\
         s3://models/prod /mnt/models modelfs ro,_netdev,nofail,allow_other,key=file:/etc/modelfs/llama.key,\
         trust=/etc/modelfs/signing.pub,x-systemd.mount-timeout=90s 0 0",
    );
    section(&mut text, "EXIT STATUS");
    for (status, means) in [
        ("0", "The models can be read."),
        ("1", "Wrong usage: an unknown word, a wrong value, options that contradict each other."),
        ("2", "This machine failed: no /dev/fuse, no such namespace, no state folder."),
        (
            "32",
            "The mount failed: store, keys, trust, signatures, memory limit or mountpoint. Also a remount that cannot be.",
        ),
    ] {
        let _ = writeln!(text, ".TP\n\\fB{status}\\fR");
        line(&mut text, means);
    }
    environment(&mut text, |_| true);
    files(&mut text);
    see_also(
        &mut text,
        &[
            ("modelfs", "1"),
            ("modelfs-mount", "1"),
            ("modelfs-umount", "1"),
            ("mount", "8"),
            ("fstab", "5"),
            ("systemd.mount", "5"),
        ],
    );
    Page { name: "mount.modelfs".into(), section: "8", text }
}

fn exit_status(text: &mut String) {
    section(text, "EXIT STATUS");
    let _ = writeln!(text, ".TP\n\\fB0\\fR\nDone.");
    let mut classes: Vec<Class> = Code::ALL.iter().map(|code| code.class()).collect();
    classes.sort_by_key(|class| class.exit_code());
    classes.dedup();
    for class in classes {
        let means = match class {
            Class::Host => "This machine failed: disk, memory map, kernel call.",
            Class::Usage => "Wrong usage: flags, configuration, limits, file modes.",
            Class::NotFound => "The named thing is not there.",
            Class::Tampered => {
                "The bytes of the store are not what was signed and sealed; or an archive to scan cannot be read to its end."
            }
            Class::Changed => "The thing moved meanwhile, or is there already.",
            Class::Unreachable => "The store or Vault did not answer in time.",
            Class::NoRoom => "No room: locked memory, handles, requests in flight.",
            Class::Held => "Programs still held files; the mount was detached.",
            Class::Denied => "No key given opens it, or access was refused.",
            Class::Insecure => {
                "Strict checks found a weakness, and the command of modelfs run was not started; or modelfs scan found \
                 weights in plaintext."
            }
        };
        let _ = writeln!(text, ".TP\n\\fB{}\\fR", class.exit_code());
        line(text, means);
    }
}

fn environment(text: &mut String, has: impl Fn(&str) -> bool) {
    section(text, "ENVIRONMENT");
    let mut names: Vec<(&str, String)> = Vec::new();
    for option in OPTIONS.iter().filter(|option| has(option.name)) {
        names.push((option.env, format!("As {}.", option.name)));
    }
    let needs = |name: &str| match name {
        "MODELFS_KEY" => has("key"),
        "MODELFS_PASSPHRASE" => has("key"),
        "MODELFS_VAULT_PASSWORD" | "MODELFS_VAULT_SECRET_ID" => has("vault-addr"),
        _ => true,
    };
    names.extend(OWN.iter().filter(|(name, ..)| needs(name)).map(|(name, _, means)| (*name, (*means).to_owned())));
    let of_others = |other: &&OtherName| match other.does {
        Does::Says(option) | Does::SaysLast(option) | Does::Asks(option, _) => has(option),
        Does::Secret | Does::OfStore => has("s3-endpoint"),
        Does::Always | Does::Nothing => false,
    };
    names.extend(OTHERS.iter().filter(of_others).map(|other| (other.name, other.means.to_owned())));
    for (name, means) in names {
        let _ = writeln!(text, ".TP\n\\fB{}\\fR", roff(name));
        line(text, &means);
    }
}

fn files(text: &mut String) {
    section(text, "FILES");
    for (path, means) in [
        (
            "/etc/modelfs.toml, ~/.config/modelfs/config.toml",
            "Options for every command: cache = \"8GiB\"; the second wins.",
        ),
        ("/etc/modelfs/", "Keys and public keys of a server, by custom; mode 0700."),
        (
            "~/.config/modelfs/signing.key",
            "The signing key that the first seal makes, and signing.key.pub, its public half.",
        ),
        ("/var/lib/modelfs/, ~/.local/state/modelfs/", "The oldest version of each model that is still accepted."),
        ("/run/modelfs/, $XDG_RUNTIME_DIR/modelfs/", "The control sockets of running mounts."),
    ] {
        let _ = writeln!(text, ".TP\n\\fI{}\\fR", roff(path));
        line(text, means);
    }
}

fn see_also(text: &mut String, pages: &[(&str, &str)]) {
    section(text, "SEE ALSO");
    let names: Vec<String> = pages.iter().map(|(name, section)| format!("\\fB{}\\fR({section})", roff(name))).collect();
    let _ = writeln!(text, "{}", names.join(", "));
}

fn section(text: &mut String, name: &str) {
    let _ = writeln!(text, ".SH {}", if name.contains(' ') { format!("\"{name}\"") } else { name.to_owned() });
}

fn paragraphs(text: &mut String, paragraphs: &[&str]) {
    for (i, paragraph) in paragraphs.iter().enumerate() {
        if i > 0 {
            text.push_str(".PP\n");
        }
        line(text, paragraph);
    }
}

fn verbatim(text: &mut String, block: &str) {
    text.push_str(".nf\n");
    for row in block.lines() {
        line(text, row);
    }
    text.push_str(".fi\n");
}

/// Indented rows are examples and stay as they are; every other row is a paragraph, for the reader's terminal to break.
fn examples(text: &mut String, block: &str) {
    let rows: Vec<&str> = block.lines().collect();
    for part in rows.chunk_by(|one, next| one.starts_with(' ') == next.starts_with(' ')) {
        if part[0].starts_with(' ') {
            verbatim(text, &part.join("\n"));
            continue;
        }
        for row in part.iter().filter(|row| !row.is_empty()) {
            text.push_str(".PP\n");
            line(text, row);
        }
    }
}

fn line(text: &mut String, words: &str) {
    let words = roff(words);
    // At the start of a line these two are commands.
    if words.starts_with(['.', '\'']) {
        text.push_str("\\&");
    }
    text.push_str(&words);
    text.push('\n');
}

/// Backslashes and dashes as they are typed.
fn roff(words: &str) -> String {
    words.replace('\\', "\\e").replace('-', "\\-").replace('\n', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(name: &str) -> String {
        pages().into_iter().find(|page| page.name == name).expect("a page").text
    }

    /// The headings of the entries of a section, without what stands after the first word.
    fn entries(page: &str, section: &str) -> Vec<String> {
        let start = page.find(&format!(".SH {section}\n")).expect("the section") + 1;
        let end = page[start..].find("\n.SH ").map_or(page.len(), |end| start + end);
        let rows: Vec<&str> = page[start..end].lines().collect();
        let heads = rows.windows(2).filter(|pair| pair[0] == ".TP").map(|pair| pair[1]);
        heads
            .map(|head| head.trim_start_matches("\\fB").split("\\fR").next().unwrap_or("").replace("\\-", "-"))
            .collect()
    }

    #[test]
    fn mount_modelfs_8_lists_the_table_of_options_and_explains_each() {
        let page = page("mount.modelfs");
        let wanted: Vec<&str> = options_of_a_mount().map(|option| option.name).collect();
        assert_eq!(entries(&page, "OPTIONS"), wanted);
        // The detector sees an option that is missing.
        let without = page.replacen(".TP\n\\fBcache\\fR", "", 1);
        assert_ne!(entries(&without, "OPTIONS"), wanted);
        for pair in page.lines().collect::<Vec<_>>().windows(2) {
            assert!(!(pair[0].starts_with("\\fB") && pair[1].trim().is_empty()), "{} is not explained", pair[0]);
        }
        for word in MOUNT_WORDS {
            assert!(page.contains(&roff(word)), "{word}");
        }
    }

    #[test]
    fn every_command_has_a_page_with_examples_exit_codes_files_and_environment() {
        let pages = pages();
        let names: Vec<&str> = pages.iter().map(|page| page.name.as_str()).collect();
        for name in ["modelfs", "modelfs-mount", "modelfs-key", "modelfs-key-rotate", "mount.modelfs"] {
            assert!(names.contains(&name), "{name} in {names:?}");
        }
        for page in pages.iter().filter(|page| !page.text.starts_with(".so ")) {
            for section in ["NAME", "SYNOPSIS", "EXAMPLES", "\"EXIT STATUS\"", "ENVIRONMENT", "FILES", "\"SEE ALSO\""] {
                assert!(page.text.contains(&format!(".SH {section}\n")), "{} has no {section}", page.name);
            }
            assert!(page.text.is_ascii(), "{} has letters that not every terminal shows", page.name);
        }
    }

    #[test]
    fn every_flag_of_a_command_is_on_its_page_and_nothing_else() {
        let mut top = Cli::command();
        top.build();
        let mount = top.find_subcommand("mount").expect("the command");
        let flags = mount.get_arguments().filter_map(|arg| arg.get_long());
        let page = page("modelfs-mount");
        for flag in flags {
            assert!(page.contains(&roff(&format!("--{flag}"))), "--{flag}");
        }
        assert_eq!(entries(&page, "\"EXIT STATUS\""), ["0", "1", "2", "3", "20", "21", "22", "23", "24", "25", "26"]);
    }

    #[test]
    fn nothing_typed_becomes_a_command_of_the_typesetter() {
        let mut text = String::new();
        line(&mut text, ".so /etc/shadow");
        line(&mut text, "a\\,b --x");
        assert_eq!(text, "\\&.so /etc/shadow\na\\e,b \\-\\-x\n");
    }
}

//! From a file to a [`Policy`], or to the one sentence that says what is wrong with it.

use std::fmt::Write as _;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use toml::{Table, Value};

use super::limits::{Limits, Rate, WAIT_MAX};
use super::{DenialRules, May, Policy, Rule, Who};
use crate::crypto::sha256;
use crate::error::{Code, Error, Result};
use crate::keys::Glob;
use crate::refuse;
use crate::units::{distance, parse_duration, parse_size};

const FILE_BYTES_MAX: u64 = 1 << 20;
/// Every open goes through them in order.
const RULES_MAX: usize = 1024;
/// The shortest part of a container's id that names it, as `docker ps` prints it.
const CONTAINER_PREFIX_MIN: usize = 12;

const TOP: &[&str] = &["denials", "limits", "rule"];
const RULE: &[&str] = &[
    "cgroups",
    "containers",
    "everybody",
    "gids",
    "groups",
    "limits",
    "may",
    "models",
    "name",
    "pods",
    "service_accounts",
    "uids",
    "users",
];
const LIMITS: &[&str] = &["bytes_burst", "bytes_per_s", "opens_burst", "opens_per_s", "wait"];
const DENIALS: &[&str] = &["block", "count", "within"];

impl Policy {
    /// # Errors
    /// `USAGE` naming the file and what is wrong with it: others can write it, it is no TOML, a key is unknown (with the
    /// nearest one), a rule says nothing of whom, of what or what.
    pub fn read(path: &Path) -> Result<Policy> {
        let named = |what: &str| format!("the policy {} {what}", path.display());
        let cannot = |e| Error::new(Code::Usage, named("cannot be read")).with_source(e);
        let mut file = std::fs::File::open(path).map_err(cannot)?;
        // The open file is asked, not the path: the path may lead elsewhere by now.
        let meta = file.metadata().map_err(cannot)?;
        // SAFETY: geteuid only reads this process's credentials.
        let own_uid = unsafe { libc::geteuid() };
        if !meta.is_file() || meta.mode() & 0o022 != 0 || !(meta.uid() == 0 || meta.uid() == own_uid) {
            let wanted = "must be a file of yours or root's, writable by its owner only; chown it and chmod go-w";
            return Err(Error::new(Code::Usage, named(wanted)));
        }
        let mut text = String::new();
        (&mut file).take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(cannot)?;
        if text.len() as u64 > FILE_BYTES_MAX {
            return Err(Error::new(Code::Usage, named("is longer than 1 MiB")));
        }
        Policy::parse(&text).map_err(|error| error.context(named("is refused")))
    }

    /// # Errors
    /// As [`Policy::read`].
    pub fn parse(text: &str) -> Result<Policy> {
        let table: Table = text
            .parse()
            .map_err(|e: toml::de::Error| Error::new(Code::Usage, format!("it is not TOML: {}", e.message())))?;
        only(&table, TOP, "a policy")?;
        let limits = match table.get("limits") {
            Some(value) => limits(as_table(value, "limits")?, "[limits]")?,
            None => Limits::default(),
        };
        let denials = match table.get("denials") {
            Some(value) => denials(as_table(value, "denials")?)?,
            None => DenialRules::default(),
        };
        let rules = match table.get("rule") {
            None => Vec::new(),
            Some(Value::Array(rules)) => {
                rules.iter().enumerate().map(|(at, it)| rule(at, it)).collect::<Result<_>>()?
            }
            Some(_) => refuse!(Usage, "rule is not a list; write each rule below a line [[rule]]"),
        };
        if rules.len() > RULES_MAX {
            refuse!(Usage, "{} rules, at most {RULES_MAX} are gone through at every open", rules.len());
        }
        if rules.is_empty() {
            refuse!(Usage, "there is no rule, so nobody could see anything; add one below a line [[rule]]");
        }
        Ok(Policy { rules, limits, denials, digest: sha256(&[text.as_bytes()]) })
    }
}

/// Refuses keys that mean nothing.
fn only(table: &Table, known: &[&str], place: &str) -> Result<()> {
    let Some(stray) = table.keys().find(|key| !known.contains(&key.as_str())) else { return Ok(()) };
    let shown: String = stray.chars().take(64).collect();
    let near = known.iter().map(|name| (distance(stray, name), *name)).min().expect("there are names");
    let mut said = format!("unknown key `{shown}` in {place}");
    let _ = match near {
        (far, best) if far <= 3.max(stray.len() / 3) => write!(said, "; did you mean `{best}`?"),
        _ => write!(said, "; it may have {}", known.join(", ")),
    };
    Err(Error::new(Code::Usage, said))
}

fn as_table<'t>(value: &'t Value, name: &str) -> Result<&'t Table> {
    value.as_table().ok_or_else(|| Error::new(Code::Usage, format!("{name} is not a table")))
}

fn rule(at: usize, value: &Value) -> Result<Rule> {
    let table = as_table(value, "rule")?;
    let name = match table.get("name") {
        None => format!("{}", at + 1),
        Some(Value::String(name)) if !name.is_empty() && name.len() <= 64 && !name.chars().any(char::is_control) => {
            name.clone()
        }
        Some(_) => refuse!(Usage, "rule {}: name is not a text of 1 to 64 characters", at + 1),
    };
    let place = format!("rule {} ({name})", at + 1);
    read_rule(table, name, &place).map_err(|error| error.context(place.clone()))
}

fn read_rule(table: &Table, name: String, place: &str) -> Result<Rule> {
    only(table, RULE, place)?;
    let mut who = Who {
        everybody: match table.get("everybody") {
            None => false,
            Some(Value::Boolean(true)) => true,
            Some(_) => refuse!(Usage, "everybody can only be true; leave it out otherwise"),
        },
        uids: numbers(table, "uids")?,
        gids: numbers(table, "gids")?,
        cgroups: texts(table, "cgroups")?,
        containers: texts(table, "containers")?,
        pods: texts(table, "pods")?,
        service_accounts: texts(table, "service_accounts")?,
    };
    for user in texts(table, "users")? {
        who.uids.push(names::uid_of(&user)?);
    }
    for group in texts(table, "groups")? {
        who.gids.push(names::gid_of(&group)?);
    }
    let hex = |text: &str| !text.is_empty() && text.bytes().all(|c| c.is_ascii_hexdigit() || c == b'-');
    for path in &who.cgroups {
        if !path.starts_with('/') || path.split('/').any(|part| part == "..") {
            refuse!(
                Usage,
                "cgroups: `{path}` is not a path from the root of control groups, as in /system.slice/x.service"
            );
        }
    }
    for id in &mut who.containers {
        if id.len() < CONTAINER_PREFIX_MIN || !hex(id) {
            refuse!(Usage, "containers: `{id}` is not an id, or its first {CONTAINER_PREFIX_MIN} digits or more");
        }
        id.make_ascii_lowercase();
    }
    for uid in &mut who.pods {
        if uid.len() < 32 || !hex(uid) {
            refuse!(
                Usage,
                "pods: `{uid}` is not the UID of a pod, as `kubectl get pod -o jsonpath={{.metadata.uid}}` says"
            );
        }
        uid.make_ascii_lowercase();
    }
    for account in &who.service_accounts {
        if account.split('/').count() != 2 || account.split('/').any(str::is_empty) {
            refuse!(Usage, "service_accounts: `{account}` is not NAMESPACE/NAME");
        }
    }
    if !who.is_anybody() {
        refuse!(
            Usage,
            "it says nothing of whom; add users, uids, groups, gids, cgroups, containers, pods, service_accounts or \
             everybody = true"
        );
    }
    if who.everybody && who != (Who { everybody: true, ..Who::default() }) {
        refuse!(Usage, "everybody and a list of some contradict each other; drop one of them");
    }
    let models = texts(table, "models")?;
    if models.is_empty() {
        refuse!(Usage, "it names no models; add models = [\"*\"] for all");
    }
    let may = match table.get("may") {
        Some(Value::String(word)) => May::ALL.into_iter().find(|may| may.name() == word),
        Some(_) | None => None,
    };
    let Some(may) = may else { refuse!(Usage, "may is none of \"none\", \"see\", \"read\"") };
    Ok(Rule {
        name,
        who,
        models: models.iter().map(|glob| Glob::new(glob)).collect::<Result<_>>()?,
        may,
        limits: table
            .get("limits")
            .map(|value| as_table(value, "limits").and_then(|table| limits(table, place)))
            .transpose()?
            .unwrap_or_default(),
    })
}

fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => format!("{:?}", text.chars().take(64).collect::<String>()),
        Value::Integer(number) => number.to_string(),
        Value::Float(number) => number.to_string(),
        Value::Boolean(yes) => yes.to_string(),
        Value::Datetime(_) | Value::Array(_) | Value::Table(_) => format!("a {}", value.type_str()),
    }
}

/// A list, or one alone.
fn list<'t>(table: &'t Table, name: &str) -> Result<&'t [Value]> {
    match table.get(name) {
        None => Ok(&[]),
        Some(Value::Array(values)) if values.is_empty() => refuse!(Usage, "{name} is an empty list; leave it out"),
        Some(Value::Array(values)) => Ok(values),
        Some(one) => Ok(std::slice::from_ref(one)),
    }
}

fn texts(table: &Table, name: &str) -> Result<Vec<String>> {
    let text = |value: &Value| match value {
        Value::String(text) if !text.is_empty() => Ok(text.clone()),
        other => refuse!(Usage, "{name} holds a {} where a text is wanted", other.type_str()),
    };
    list(table, name)?.iter().map(text).collect()
}

fn numbers(table: &Table, name: &str) -> Result<Vec<u32>> {
    let number = |value: &Value| match value.as_integer().and_then(|number| u32::try_from(number).ok()) {
        // All bits set is what system calls say for nobody.
        Some(number) if number != u32::MAX => Ok(number),
        Some(_) | None => refuse!(Usage, "{name} holds {}, which is no number from 0 to 4294967294", shown(value)),
    };
    list(table, name)?.iter().map(number).collect()
}

fn count(table: &Table, name: &str) -> Result<Option<u32>> {
    match table.get(name) {
        None => Ok(None),
        Some(value) => match value.as_integer().and_then(|number| u32::try_from(number).ok()) {
            Some(number) if number > 0 => Ok(Some(number)),
            Some(_) | None => refuse!(Usage, "{name} is {}; give a whole number from 1 on", shown(value)),
        },
    }
}

fn bytes(table: &Table, name: &str) -> Result<Option<u64>> {
    let parsed = match table.get(name) {
        None => return Ok(None),
        Some(Value::String(text)) => parse_size(text.trim_end_matches("/s")).map_err(|e| e.context(name.to_owned()))?,
        Some(Value::Integer(number)) if *number > 0 => number.unsigned_abs(),
        Some(other) => refuse!(Usage, "{name} is {}; give a size as in \"500MiB\"", shown(other)),
    };
    if parsed == 0 {
        refuse!(Usage, "{name} is 0; leave it out for no limit");
    }
    Ok(Some(parsed))
}

fn time(table: &Table, name: &str) -> Result<Option<Duration>> {
    match table.get(name) {
        None => Ok(None),
        Some(Value::String(text)) => parse_duration(text).map(Some).map_err(|e| e.context(name.to_owned())),
        Some(other) => refuse!(Usage, "{name} is {}; give a time as in \"5m\"", shown(other)),
    }
}

fn limits(table: &Table, place: &str) -> Result<Limits> {
    only(table, LIMITS, place)?;
    let wait = time(table, "wait")?;
    if let Some(wait) = wait.filter(|wait| *wait > WAIT_MAX) {
        refuse!(Usage, "wait {wait:?}: who waits in an open cannot be killed; give at most {} s", WAIT_MAX.as_secs());
    }
    let opens =
        rate("opens", count(table, "opens_per_s")?.map(u64::from), count(table, "opens_burst")?.map(u64::from))?;
    let bytes = rate("bytes", bytes(table, "bytes_per_s")?, bytes(table, "bytes_burst")?)?;
    Ok(Limits { opens, bytes, wait })
}

fn rate(of: &str, per_s: Option<u64>, burst: Option<u64>) -> Result<Option<Rate>> {
    match (per_s, burst) {
        (None, None) => Ok(None),
        // A second's worth at once.
        (Some(per_s), burst) => Ok(Some(Rate { per_s, burst: burst.unwrap_or(per_s) })),
        (None, Some(_)) => refuse!(Usage, "{of}_burst without {of}_per_s limits nothing; add {of}_per_s"),
    }
}

fn denials(table: &Table) -> Result<DenialRules> {
    only(table, DENIALS, "[denials]")?;
    let usual = DenialRules::default();
    let rules = DenialRules {
        count: count(table, "count")?.unwrap_or(usual.count),
        within: time(table, "within")?.unwrap_or(usual.within),
        block: time(table, "block")?.unwrap_or(usual.block),
    };
    if rules.count > DenialRules::COUNT_MAX {
        refuse!(Usage, "count is {}; more than {} denials are not kept in mind", rules.count, DenialRules::COUNT_MAX);
    }
    if rules.within.is_zero() || rules.block.is_zero() {
        refuse!(Usage, "[denials]: within and block must be longer than nothing");
    }
    Ok(rules)
}

/// Names of this machine, however it knows them.
mod names {
    use std::ffi::CString;

    use crate::error::{Code, Error, Result};

    /// Room for the strings of one entry; a group's members may be many.
    const ENTRY_BYTES: usize = 1 << 20;

    fn c_name(name: &str) -> Result<CString> {
        CString::new(name).map_err(|e| Error::new(Code::Usage, format!("{name:?} is no name")).with_source(e))
    }

    fn unknown(kind: &str, name: &str, fix: &str) -> Error {
        Error::new(Code::Usage, format!("this machine knows no {kind} {name}; write {fix} with its number"))
    }

    pub(super) fn uid_of(name: &str) -> Result<u32> {
        let c_name = c_name(name)?;
        let mut room = vec![0; ENTRY_BYTES];
        // SAFETY: a passwd is numbers and pointers, for which zeros are a fit start; everything outlives the call, and the
        // length is that of the room.
        let found = unsafe {
            let mut entry: libc::passwd = std::mem::zeroed();
            let mut there = std::ptr::null_mut();
            let rc = libc::getpwnam_r(c_name.as_ptr(), &raw mut entry, room.as_mut_ptr(), room.len(), &raw mut there);
            (rc == 0 && !there.is_null()).then_some(entry.pw_uid)
        };
        found.ok_or_else(|| unknown("user", name, "uids"))
    }

    pub(super) fn gid_of(name: &str) -> Result<u32> {
        let c_name = c_name(name)?;
        let mut room = vec![0; ENTRY_BYTES];
        // SAFETY: as above, with a group.
        let found = unsafe {
            let mut entry: libc::group = std::mem::zeroed();
            let mut there = std::ptr::null_mut();
            let rc = libc::getgrnam_r(c_name.as_ptr(), &raw mut entry, room.as_mut_ptr(), room.len(), &raw mut there);
            (rc == 0 && !there.is_null()).then_some(entry.gr_gid)
        };
        found.ok_or_else(|| unknown("group", name, "gids"))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::policy::{Share, Shares};

    const GOOD: &str = r#"
[limits]
opens_per_s = 20
opens_burst = 100
bytes_per_s = "500MiB"
wait = "2s"

[denials]
count = 3
within = "1m"
block = "10m"

[[rule]]
name = "trainers"
users = ["root"]
groups = ["root"]
gids = 4300
models = ["acme/*", "base"]
may = "read"
limits = { bytes_per_s = "1GiB", bytes_burst = "8GiB" }

[[rule]]
everybody = true
models = "open/*"
may = "see"
"#;

    #[test]
    fn a_policy_says_whom_what_and_how_much() {
        let policy = Policy::parse(GOOD).expect("a policy");
        assert_eq!(
            policy.denials,
            DenialRules { count: 3, within: Duration::from_secs(60), block: Duration::from_secs(600) }
        );
        assert_eq!(policy.limits.opens, Some(Rate { per_s: 20, burst: 100 }));
        assert_eq!(policy.limits.bytes, Some(Rate { per_s: 500 << 20, burst: 500 << 20 }));
        assert_eq!(
            (policy.rules[0].who.uids.as_slice(), policy.rules[0].who.gids.as_slice()),
            (&[0][..], &[4300, 0][..])
        );
        let (opens, bytes) = (Rate { per_s: 20, burst: 100 }, Rate { per_s: 500 << 20, burst: 500 << 20 });
        let of_all = |rate| Some(Share { rate, rule: None });
        let all = Shares { opens: of_all(opens), bytes: of_all(bytes), wait: Duration::from_secs(2) };
        assert_eq!((policy.shares_of(Some(1)), policy.shares_of(None)), (all, all));
        let own = Some(Share { rate: Rate { per_s: 1 << 30, burst: 8 << 30 }, rule: Some(0) });
        assert_eq!(policy.shares_of(Some(0)), Shares { bytes: own, ..all }, "what a rule leaves out is the policy's");
        assert_eq!(policy.told(Some(0)), "rule 1 (trainers)");
        let usual = Policy::parse("[[rule]]\neverybody = true\nmodels = [\"*\"]\nmay = \"read\"").expect("a policy");
        assert_eq!(
            (usual.denials.count, usual.denials.within.as_secs(), usual.denials.block.as_secs()),
            (5, 300, 3600)
        );
    }

    /// Each mistake is refused with the word that mends it.
    #[test]
    fn one_mistake_refuses_the_whole_file_and_says_which() {
        let rule = "[[rule]]\nuids = [1000]\nmodels = [\"*\"]\nmay = \"read\"\n";
        let cases = [
            (String::new(), "[[rule]]"),
            ("[[rule".into(), "not TOML"),
            (format!("[limit]\n{rule}"), "did you mean `limits`"),
            (rule.replace("uids", "uid"), "did you mean `uids`"),
            (rule.replace("uids", "who_it_is_about"), "it may have"),
            (rule.replace("models", "model"), "did you mean `models`"),
            (rule.replace("uids = [1000]\n", ""), "nothing of whom"),
            (rule.replace("models = [\"*\"]\n", ""), "models = [\"*\"]"),
            (rule.replace("read", "write"), "\"none\", \"see\", \"read\""),
            (rule.replace("may = \"read\"\n", ""), "\"none\", \"see\", \"read\""),
            (rule.replace("[1000]", "[-1]"), "from 0"),
            (rule.replace("[1000]", "[4294967295]"), "from 0"),
            (rule.replace("[1000]", "[]"), "empty list"),
            (rule.replace("[1000]", "[\"ann\"]"), "uids"),
            (rule.replace("uids = [1000]", "users = [\"nobody-of-that-name\"]"), "write uids"),
            (rule.replace("uids = [1000]", "groups = [\"no-group-of-that-name\"]"), "write gids"),
            (rule.replace("uids = [1000]", "cgroups = [\"system.slice\"]"), "/system.slice/x.service"),
            (rule.replace("uids = [1000]", "cgroups = [\"/a/../b\"]"), "/system.slice/x.service"),
            (rule.replace("uids = [1000]", "containers = [\"3f2a\"]"), "12 digits"),
            (rule.replace("uids = [1000]", "containers = [\"vllm-container\"]"), "12 digits"),
            (rule.replace("uids = [1000]", "pods = [\"llama\"]"), "UID of a pod"),
            (rule.replace("uids = [1000]", "service_accounts = [\"llama\"]"), "NAMESPACE/NAME"),
            (rule.replace("uids = [1000]", "everybody = false"), "can only be true"),
            (format!("{rule}everybody = true\n"), "contradict"),
            (rule.replace("[\"*\"]", "[\"[ab]\"]"), "`*` and `?`"),
            (format!("{rule}limits = {{ opens = 3 }}\n"), "opens_per_s"),
            (format!("[limits]\nopens_burst = 3\n{rule}"), "add opens_per_s"),
            (format!("[limits]\nopens_per_s = 0\n{rule}"), "from 1 on"),
            (format!("[limits]\nbytes_per_s = \"fast\"\n{rule}"), "bytes_per_s"),
            (format!("[limits]\nwait = \"2h\"\n{rule}"), "at most 30 s"),
            (format!("[denials]\nwithin = \"0s\"\n{rule}"), "longer than nothing"),
            (format!("[denials]\ncount = 100000\n{rule}"), "kept in mind"),
            (format!("[denials]\nblocks = \"1h\"\n{rule}"), "did you mean `block`"),
        ];
        for (text, wanted) in cases {
            let error = Policy::parse(&text).expect_err(&text);
            assert_eq!(error.code(), Code::Usage, "{text}");
            assert!(error.chain().contains(wanted), "{text}: {}", error.chain());
        }
        Policy::parse(rule).expect("without a mistake it is one");
    }

    #[test]
    fn a_file_that_others_can_write_or_that_is_endless_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("policy.toml");
        std::fs::write(&path, GOOD).expect("written");
        let mode = |mode| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("set");
        mode(0o640);
        Policy::read(&path).expect("a policy");
        for open in [0o660, 0o602] {
            mode(open);
            let error = Policy::read(&path).expect_err("others can write it");
            assert!(error.chain().contains("chmod go-w"), "{error:?}");
        }
        mode(0o600);
        std::fs::write(&path, format!("{GOOD}#{}", "x".repeat(FILE_BYTES_MAX as usize))).expect("written");
        assert!(Policy::read(&path).expect_err("long").chain().contains("1 MiB"));
        assert!(Policy::read(folder.path()).is_err(), "a folder");
        assert!(Policy::read(&folder.path().join("none")).expect_err("not there").chain().contains("cannot be read"));
    }
}

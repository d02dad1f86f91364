//! `modelfs config`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::out::table;
use super::{Flags, Global, csi, volume_plugin};
use crate::config::check::{Finding, Places, findings};
use crate::config::layers::{Origin, Setting, split_list};
use crate::config::names::{Does, OTHERS, OWN};
use crate::config::options::{Form, Kind, OPTIONS, OptionSpec, Section, takes};
use crate::config::rules::{Level, OF_PARSERS, RULES};
use crate::config::{Layers, base_layers_each};
use crate::error::{Code, Error, Result};

/// Say what is wrong with the configuration, what it is and where each value comes from, or what can be in it.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ConfigArgs {
    #[command(subcommand)]
    command: ConfigCommand,
}

const EXAMPLES: &str = "\
Examples:
  modelfs config check s3://models/prod /mnt/models    what would refuse this mount, all of it
  modelfs config show                                  each option, its value and its origin
  modelfs config options                               every option there is

docs/CONFIGURATION.md explains them.";

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    Check(CheckArgs),
    Show(ShowArgs),
    Options(OptionsArgs),
}

/// Whose configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Who {
    Mount,
    Run,
    VolumePlugin,
    Csi,
}

impl Who {
    fn takes(self) -> u16 {
        match self {
            Who::Mount => takes::MOUNT,
            Who::Run => takes::MOUNT | takes::RUN,
            Who::VolumePlugin => takes::PLUGIN,
            Who::Csi => takes::CSI,
        }
    }
}

/// Say what is wrong, all of it, and start nothing; 2 if anything would refuse the start.
#[derive(Debug, Args)]
#[command(after_help = CHECK_EXAMPLES)]
struct CheckArgs {
    /// The store that would be mounted
    #[arg(requires = "mountpoint")]
    store: Option<String>,
    /// Where
    mountpoint: Option<PathBuf>,
    /// For whom
    #[arg(long = "for", value_name = "WHO", value_enum, default_value = "mount")]
    who: Who,
    /// Words of fstab, separated by commas
    #[arg(short = 'o', value_name = "OPTIONS")]
    options: Vec<String>,
    #[command(flatten)]
    flags: Box<Flags<{ takes::ALL }>>,
}

const CHECK_EXAMPLES: &str = "\
Examples:
  modelfs config check                          file and environment, as a mount would read them
  modelfs config check s3://models/prod /mnt/models --cache 64GiB
  modelfs --config ./modelfs.toml config check --for csi --node-id node-7
  modelfs config check /srv/models /mnt \\
      -o ro,key=file:/etc/modelfs/llama.key,trust=/etc/modelfs/publisher.pub

It asks nobody over a network, reads no secret and changes nothing: files are looked for, and their modes looked at.";

/// Print every option: its value, where that was written, and what counts without it. Secrets are not shown.
#[derive(Debug, Args)]
#[command(after_help = SHOW_EXAMPLES)]
struct ShowArgs {
    /// Only options that this one takes
    #[arg(long = "for", value_name = "WHO", value_enum)]
    who: Option<Who>,
    /// Only options that are set somewhere
    #[arg(long)]
    set: bool,
    #[command(flatten)]
    flags: Box<Flags<{ takes::ALL }>>,
}

const SHOW_EXAMPLES: &str = "\
Examples:
  modelfs config show --set                                only what is set somewhere
  modelfs config show --for run --json
  MODELFS_CACHE=8GiB modelfs config show | grep cache";

/// Print the reference: options, names of the environment, what does not go together; Markdown, or JSON with --json.
#[derive(Debug, Args)]
#[command(after_help = OPTIONS_EXAMPLES)]
struct OptionsArgs {}

const OPTIONS_EXAMPLES: &str = "\
Examples:
  modelfs config options
  modelfs config options --json | jq '.options[].env'";

pub fn run(args: &ConfigArgs, global: &Global) -> Result<()> {
    match &args.command {
        ConfigCommand::Check(args) => check(args, global),
        ConfigCommand::Show(args) => show(args, global),
        ConfigCommand::Options(_) => options(global),
    }
}

/// As every command lays them, without ending at the first error.
fn layers(global: &Global, flags: &Flags<{ takes::ALL }>) -> (Layers, Vec<Error>) {
    let (mut layers, errors) = base_layers_each(global.config.as_deref());
    global.lay(&mut layers);
    flags.lay(&mut layers);
    (layers, errors)
}

fn check(args: &CheckArgs, global: &Global) -> Result<()> {
    let (mut layers, mut errors) = base_layers_each(global.config.as_deref());
    let words: Vec<String> = args.options.iter().flat_map(|words| split_list(words)).collect();
    errors.extend(layers.mount_options(&words, false).err());
    global.lay(&mut layers);
    args.flags.lay(&mut layers);
    if let (Some(_), Who::VolumePlugin | Who::Csi) = (&args.store, args.who) {
        return Err(Error::new(Code::Usage, "a driver mounts many stores: STORE and MOUNTPOINT are for mount and run"));
    }
    let places = Places { store: args.store.as_deref(), mountpoint: args.mountpoint.as_deref() };
    let whole = || match args.who {
        Who::Mount | Who::Run => Ok(()),
        Who::VolumePlugin => volume_plugin::plan(layers.clone()).map(drop),
        Who::Csi => csi::plan(layers.clone()).map(drop),
    };
    let found = findings(&layers, errors, args.who.takes(), places, whole);
    let refused = found.iter().filter(|finding| finding.level == Level::Refused).count();
    let level = |finding: &Finding| match finding.level {
        Level::Refused => "refused",
        Level::Warned => "warning",
    };
    let told: Vec<Value> =
        found.iter().map(|finding| json!({ "level": level(finding), "text": finding.text })).collect();
    let value = json!({ "ok": refused == 0, "files": layers.files(), "findings": told });
    global.out().result(&value, || {
        let lines = found.iter().map(|finding| format!("{}: {}\n", level(finding), finding.text));
        let all: String = lines.collect();
        match (all.is_empty(), global.quiet) {
            (false, _) => all,
            (true, true) => String::new(),
            (true, false) => "nothing is wrong\n".into(),
        }
    })?;
    match refused {
        0 => Ok(()),
        1 => Err(Error::new(Code::Usage, "the configuration is refused")),
        more => Err(Error::new(Code::Usage, format!("the configuration is refused, for {more} reasons"))),
    }
}

/// `None`: a secret, or what may be one.
fn shown(spec: &OptionSpec, setting: &Setting) -> Vec<Option<String>> {
    setting.values.iter().map(|value| spec.shown(value)).collect()
}

const HIDDEN: &str = "(not shown)";

fn origin(setting: Option<&Setting>) -> Value {
    match setting.map(|setting| &setting.origin) {
        None => json!({ "kind": "default" }),
        Some(Origin::File(path)) => json!({ "kind": "file", "path": path }),
        Some(Origin::Env(name)) => json!({ "kind": "environment", "name": name }),
        Some(Origin::MountOption) => json!({ "kind": "mount-option" }),
        Some(Origin::Flag) => json!({ "kind": "flag" }),
    }
}

fn show(args: &ShowArgs, global: &Global) -> Result<()> {
    let (layers, errors) = layers(global, &args.flags);
    let who = args.who.map_or(takes::ALL, Who::takes);
    let wanted = |spec: &&OptionSpec| spec.is_taken_by(who) && (!args.set || layers.get(spec.name).is_some());
    let specs: Vec<&OptionSpec> = OPTIONS.iter().filter(wanted).collect();
    let mut values = Vec::new();
    let mut rows = Vec::new();
    for spec in specs {
        let setting = layers.get(spec.name);
        let shown = setting.map_or(Vec::new(), |setting| shown(spec, setting));
        let redacted = shown.iter().any(Option::is_none);
        let texts: Vec<String> = shown.into_iter().map(|text| text.unwrap_or_else(|| HIDDEN.into())).collect();
        let value = match (spec.kind, setting) {
            (_, None) => Value::Null,
            (Kind::Many, _) => json!(texts),
            // A list of one: the last one of a layer is the one that counts.
            (Kind::One | Kind::Switch, _) => json!(texts.last()),
        };
        values.push(json!({
            "name": spec.name,
            "value": value,
            "origin": origin(setting),
            "default": spec.default,
            "env": spec.env,
            "redacted": redacted,
        }));
        let text = match setting {
            None if spec.default.is_empty() => "-".into(),
            None => spec.default.to_owned(),
            Some(_) => texts.join(", "),
        };
        let from = match setting.map(|setting| &setting.origin) {
            None => "default".into(),
            Some(Origin::File(path)) => path.display().to_string(),
            Some(Origin::Env(name)) => (*name).to_owned(),
            Some(Origin::MountOption) => "-o".into(),
            Some(Origin::Flag) => format!("--{}", spec.name),
        };
        rows.push(vec![spec.name.to_owned(), text, from]);
    }
    let secret = OWN.iter().filter(|(_, secret, _)| *secret).map(|(name, ..)| *name);
    let secrets = secret.chain(OTHERS.iter().filter(|other| other.does == Does::Secret).map(|other| other.name));
    let secrets: Vec<&str> = secrets.filter(|name| std::env::var_os(name).is_some()).collect();
    let value = json!({ "options": values, "files": layers.files(), "secrets_set": secrets });
    global.out().result(&value, || {
        let mut text = table(&["option", "value", "from"], &[false, false, false], &rows);
        for name in &secrets {
            text.push_str(&format!("{name} is set, and not shown\n"));
        }
        text
    })?;
    crate::config::layers::refuse_all(errors)
}

fn taken_by(who: u16) -> String {
    match who {
        takes::ALL => "all".into(),
        _ => {
            let names = takes::NAMES.iter().filter(|(bit, _)| who & bit != 0).map(|(_, name)| *name);
            names.collect::<Vec<_>>().join(", ")
        }
    }
}

/// Text in a cell of a Markdown table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

fn level(level: Level) -> &'static str {
    match level {
        Level::Refused => "refused",
        Level::Warned => "warning",
    }
}

fn does(does: Does) -> String {
    match does {
        Does::Says(option) => format!("as `{option}`"),
        Does::SaysLast(option) => format!("as `{option}`, below the file"),
        Does::Asks(option, value) => format!("`true`: `{option}` = {value}"),
        Does::Always => "nothing: always so".into(),
        Does::OfStore => "checks or names the store".into(),
        Does::Nothing => "nothing".into(),
        Does::Secret => "a secret".into(),
    }
}

/// The parts of docs/CONFIGURATION.md that come from the code, each with its name there.
fn reference() -> Vec<(&'static str, String)> {
    let mut options = String::new();
    for section in Section::ALL {
        options.push_str(&format!("### {}\n\n", section.title()));
        options.push_str(
            "| option | value, as in | default | environment | taken by | meaning |\n|---|---|---|---|---|---|\n",
        );
        for spec in OPTIONS.iter().filter(|spec| spec.section == section) {
            let often = if spec.kind == Kind::Many { " (list)" } else { "" };
            options.push_str(&format!(
                "| `{}` | {}{often}: `{}` | {} | `{}` | {} | {} |\n",
                spec.name,
                cell(spec.word),
                cell(spec.example),
                cell(spec.default),
                spec.env,
                taken_by(spec.takes),
                cell(spec.means),
            ));
        }
        options.push('\n');
    }
    let mut own = String::from("| name | secret | meaning |\n|---|---|---|\n");
    for (name, secret, means) in OWN {
        own.push_str(&format!("| `{name}` | {} | {means} |\n", if *secret { "yes" } else { "no" }));
    }
    let mut others = String::from("| name | does | meaning |\n|---|---|---|\n");
    for other in OTHERS {
        others.push_str(&format!("| `{}` | {} | {} |\n", other.name, cell(&does(other.does)), cell(other.means)));
    }
    let mut rules = String::from("| rule | together | then | why |\n|---|---|---|---|\n");
    for rule in RULES {
        rules.push_str(&format!(
            "| `{}` | {} | {} | {} |\n",
            rule.id,
            cell(rule.together),
            level(rule.level),
            rule.why
        ));
    }
    for (id, together, why) in OF_PARSERS {
        rules.push_str(&format!("| `{id}` | {} | refused | {why} |\n", cell(together)));
    }
    let trimmed = |text: String| format!("{}\n", text.trim_end());
    vec![
        ("options", trimmed(options)),
        ("own names", trimmed(own)),
        ("names of others", trimmed(others)),
        ("combinations", trimmed(rules)),
    ]
}

fn options(global: &Global) -> Result<()> {
    let secret = |spec: &OptionSpec| matches!(spec.form, Form::Url | Form::ReadOrHide(_));
    let of_option = |spec: &OptionSpec| {
        json!({
            "name": spec.name,
            "kind": match spec.kind { Kind::One => "one", Kind::Many => "many", Kind::Switch => "switch" },
            "env": spec.env,
            "value": spec.word,
            "example": spec.example,
            "default": spec.default,
            "means": spec.means,
            "section": spec.section.title(),
            "taken_by": taken_by(spec.takes),
            "may_hold_a_secret": secret(spec),
        })
    };
    let own = |(name, secret, means): &(&str, bool, &str)| json!({ "name": name, "secret": secret, "means": means });
    let parsers = OF_PARSERS.iter().map(|(id, together, why)| (*id, *together, *why, Level::Refused));
    let rules = RULES.iter().map(|rule| (rule.id, rule.together, rule.why, rule.level)).chain(parsers);
    let value = json!({
        "options": OPTIONS.iter().map(of_option).collect::<Vec<_>>(),
        "own_names": OWN.iter().map(own).collect::<Vec<_>>(),
        "names_of_others": OTHERS
            .iter()
            .map(|other| json!({ "name": other.name, "does": does(other.does), "means": other.means }))
            .collect::<Vec<_>>(),
        "combinations": rules
            .map(|(id, together, why, then)| json!({ "rule": id, "together": together, "why": why, "then": level(then) }))
            .collect::<Vec<_>>(),
    });
    global.out().result(&value, || {
        let parts = reference().into_iter();
        parts.map(|(name, text)| format!("<!-- {name} -->\n{text}<!-- end -->\n")).collect::<Vec<_>>().join("\n")
    })
}

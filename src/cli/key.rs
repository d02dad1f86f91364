//! `modelfs key`: who opens a version, and under which key it lies.

use std::sync::Arc;

use clap::{Args, Subcommand};
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::access::{Reading, need_registrable, raw_key_for_record, reading, runtime};
use super::out::{printable, table};
use super::record::recorded;
use super::seal::SealBar;
use super::signers::Signers;
use super::tag::releaser;
use super::{AccessArgs, ChangeArgs, Out};
use crate::catalog::{self, Registered, Registration, SealedRecord};
use crate::config::Layers;
use crate::crypto::PublicKey;
use crate::error::{Code, Error, Result};
use crate::format::{ManifestDigest, Slot, SlotParams, Slots};
use crate::keys::{
    BrokenTag, Candidate, FloorPolicy, KeySource, Keyring, ModelSelector, Resolved, Resolver, Role, Signer, Versions,
    Wanted, prompt_new, prompt_terminal,
};
use crate::refuse;
use crate::rotate::{
    Edit, Edited, Keys, Level, Rekey, Rekeyed, Rewrap, Rotator, Withdrawn, opens, opens_by, transit_version,
};
use crate::seal::{ProgressFn, Releaser};
use crate::telemetry::events::Kind as Event;
use crate::units::{parse_duration, show_size};
use crate::vault::{TransitKey, Vault};

/// Show who can open a version; add, remove and rotate the keys that do.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct KeyArgs {
    #[command(subcommand)]
    command: KeyCommand,
}

#[derive(Debug, Subcommand)]
enum KeyCommand {
    List(ListArgs),
    Add(AddArgs),
    Remove(RemoveArgs),
    Rotate(RotateArgs),
}

const EXAMPLES: &str = "\
Examples:
  modelfs key list s3://models/prod acme/llama --trust publisher.pub
  modelfs key add s3://models/prod acme/llama --key vault-transit:transit/models \\
      --add passphrase --label break-glass
  modelfs key remove s3://models/prod acme/llama --key vault-transit:transit/models \\
      --label break-glass
  modelfs key rotate s3://models/prod acme/llama --key file:old.key --to file:new.key

Nothing of the model itself is rewritten but by `key rotate --reencrypt`. Adding, removing and replacing keys does not take \
the data key back from whoever unwrapped it before: docs/KEYS.md says what each rotation does and does not achieve.";

/// Show the key slots of a version; with --key, which of those keys opens which.
#[derive(Debug, Args)]
#[command(after_help = LIST_EXAMPLES)]
pub struct ListArgs {
    /// file:///srv/models, a plain path, or s3://bucket/prefix
    store: String,
    /// NAME, NAME@TAG or NAME@VERSION
    model: String,
    #[command(flatten)]
    access: AccessArgs,
}

const LIST_EXAMPLES: &str = "\
Examples:
  modelfs key list s3://models/prod acme/llama --trust publisher.pub
  modelfs key list /srv/models acme/llama@3 --trust signing.pub --key file:node.key \\
      --json | jq -r '.slots[].label'

No key material is shown. Trying a passphrase takes as long as guessing it once.";

/// Let one more key open a version.
#[derive(Debug, Args)]
#[command(after_help = ADD_EXAMPLES)]
pub struct AddArgs {
    /// file:///srv/models, a plain path, or s3://bucket/prefix
    store: String,
    /// NAME, NAME@TAG or NAME@VERSION
    model: String,
    /// The key that shall open it as well
    #[arg(long, value_name = "KEY")]
    add: String,
    /// What the slot is called: a-z 0-9 . _ - [default: the kind of key]
    #[arg(long, value_name = "LABEL")]
    label: Option<String>,
    #[command(flatten)]
    signing: SigningArgs,
    #[command(flatten)]
    access: ChangeArgs,
}

const ADD_EXAMPLES: &str = "\
Examples:
  modelfs key add s3://models/prod acme/llama --key file:node.key --add passphrase \\
      --label break-glass
  modelfs key add s3://models/prod acme/llama@2 --key file:node.key --add file:auditor.key \\
      --sign release.key

--key must open the version already. Running it again changes nothing.";

/// Let one key less open a version.
#[derive(Debug, Args)]
#[command(after_help = REMOVE_EXAMPLES)]
pub struct RemoveArgs {
    /// file:///srv/models, a plain path, or s3://bucket/prefix
    store: String,
    /// NAME, NAME@TAG or NAME@VERSION
    model: String,
    /// The slot to remove, as `modelfs key list` calls it
    #[arg(long, value_name = "LABEL")]
    label: String,
    #[command(flatten)]
    signing: SigningArgs,
    #[command(flatten)]
    access: ChangeArgs,
}

const REMOVE_EXAMPLES: &str = "\
Examples:
  modelfs key remove s3://models/prod acme/llama --key vault-transit:transit/models \\
      --label break-glass

One of the --key given must open what is left. Whoever copied the slot, or unwrapped the data key, still has it.";

/// Replace keys, or the data key, or encrypt everything anew.
#[derive(Debug, Args)]
#[command(after_help = ROTATE_EXAMPLES)]
pub struct RotateArgs {
    /// file:///srv/models, a plain path, or s3://bucket/prefix
    store: String,
    /// NAME, NAME@TAG or NAME@VERSION; with --all the bare NAME, or nothing
    model: Option<String>,
    /// Every version that a tag leads to: of MODEL, or of every model that tells its name
    #[arg(long)]
    all: bool,
    /// The key in the place of those --key opens with; with --new-key and --reencrypt again for more
    #[arg(long, value_name = "KEY")]
    to: Vec<String>,
    /// The label of the new slot, or with --rewrap of the only slot to rewrap [default: the label it had]
    #[arg(long, value_name = "LABEL")]
    label: Option<String>,
    /// Move transit slots to the newest version of the key in Vault, which --key names; opens nothing
    #[arg(long, conflicts_with_all = ["to", "new_key", "reencrypt"])]
    rewrap: bool,
    /// A new data key, as the next version; the objects stay
    #[arg(long, conflicts_with = "reencrypt")]
    new_key: bool,
    /// A new data key, and every object encrypted anew, as the next version
    #[arg(long)]
    reencrypt: bool,
    /// With --new-key or --reencrypt: readers who see the new version refuse every older one. Refused while another tag names
    /// one of those; with --all the old ones are withdrawn when all tags of a model were rotated
    #[arg(long)]
    withdraw_old: bool,
    /// Write the rotated version into this record of a catalog too, as in vault-kv://secret/models/acme/llama
    #[arg(long, value_name = "vault-kv://MOUNT/PATH", conflicts_with = "all")]
    register: Option<String>,
    /// With --register and no transit key: put the raw key into Vault, where every reader of the record has it
    #[arg(long, requires = "register", conflicts_with = "rewrap")]
    register_raw_key: bool,
    /// With --new-key or --reencrypt: leave versions alone that are younger than this, as in 7d [default with --all: 1d;
    /// without: none]
    #[arg(long, value_name = "AGE")]
    if_older: Option<String>,
    #[command(flatten)]
    signing: SigningArgs,
    #[command(flatten)]
    access: ChangeArgs,
}

const ROTATE_EXAMPLES: &str = "\
Examples:
  modelfs key rotate s3://models/prod acme/llama --key file:old.key --to file:new.key
  modelfs key rotate s3://models/prod acme/llama --key passphrase --to passphrase
  modelfs key rotate s3://models/prod --all --key file:old.key --to file:new.key   somebody left
  modelfs key rotate s3://models/prod --all --rewrap --key vault-transit:transit/models
      after `vault write -f transit/keys/models/rotate`
  modelfs key rotate s3://models/prod acme/llama --rewrap --key vault-transit:transit/models \\
      --register vault-kv://secret/models/acme/llama   its record in a catalog too
  modelfs key rotate s3://models/prod acme/llama --key file:node.key --new-key \\
      --sign publisher.key --release release.key
  modelfs key rotate s3://models/prod acme/llama --key file:node.key --to file:new.key \\
      --reencrypt --withdraw-old

What died half-way is completed by running it again. Old objects are left to `modelfs prune`.";

/// Who signs what a rotation writes.
#[derive(Debug, Args)]
struct SigningArgs {
    /// The key that signs refs, and with --new-key or --reencrypt the new version: a file, or vault-transit:MOUNT/KEY; again
    /// for more [default: ~/.config/modelfs/signing.key]
    #[arg(long, value_name = "KEY")]
    sign: Vec<String>,
    /// The release key that signs refs, where --sign only signs versions; up to 4 times
    #[arg(long, value_name = "KEY")]
    release: Vec<String>,
}

impl SigningArgs {
    fn releasers(&self, reading: &Reading) -> Result<Vec<Arc<dyn Signer>>> {
        let signers = Signers::new(&reading.access);
        if self.release.is_empty() {
            return signers.releasers(&self.sign, "--sign");
        }
        signers.releasers(&self.release, "--release")
    }
}

pub fn run(args: &KeyArgs, layers: Layers, out: &Out) -> Result<()> {
    match &args.command {
        KeyCommand::List(args) => list(args, layers, out),
        KeyCommand::Add(args) => {
            recorded((Event::Rotation, "key add"), &args.access, layers, out, |layers, out| add(args, layers, out))
        }
        KeyCommand::Remove(args) => {
            recorded((Event::Rotation, "key remove"), &args.access, layers, out, |layers, out| {
                remove(args, layers, out)
            })
        }
        KeyCommand::Rotate(args) => {
            recorded((Event::Rotation, "key rotate"), &args.access, layers, out, |layers, out| {
                rotate(args, layers, out)
            })
        }
    }
}

fn list(args: &ListArgs, mut layers: Layers, out: &Out) -> Result<()> {
    args.access.lay(&mut layers);
    let reading = reading(&args.store, &layers)?;
    let resolved = runtime()?.block_on(reading.resolve(&args.model))?;
    // One ring a source: which of them opens is what is asked.
    let rings = reading
        .access
        .keys
        .iter()
        .map(|source| ring(&reading, std::slice::from_ref(source)))
        .collect::<Result<Vec<Keys>>>()?;
    let mut rows = Vec::new();
    for slot in &resolved.slots.slots {
        let mut opened_by = Vec::new();
        for ring in &rings {
            if opens(ring, &resolved.slots, &resolved.header, slot)? {
                opened_by.push(ring.sources()[0].to_string());
            }
        }
        rows.push((slot, opened_by));
    }
    let value = listed(&reading, &resolved, &rows);
    out.result(&value, || show(&resolved, &rows, !rings.is_empty()))
}

fn listed(reading: &Reading, resolved: &Resolved, rows: &[(&Slot, Vec<String>)]) -> Value {
    let slots: Vec<Value> = rows
        .iter()
        .map(|(slot, opened_by)| {
            let mut row = json!({
                "label": slot.label, "kind": slot.kind().name(), "type": slot.kind().number(), "detail": detail(slot),
            });
            if !reading.access.keys.is_empty() {
                row["opened_by"] = json!(opened_by);
            }
            row
        })
        .collect();
    json!({
        "store": reading.url.to_string(), "model": resolved.name, "version": resolved.header.seq,
        "manifest": format!("sha256:{}", resolved.digest), "vid": resolved.header.vid,
        "generation": resolved.slots.generation,
        "min_generation": resolved.reference.map(|head| head.min_slots_generation), "slots": slots,
    })
}

fn show(resolved: &Resolved, rows: &[(&Slot, Vec<String>)], tried: bool) -> String {
    let lines: Vec<Vec<String>> = rows
        .iter()
        .map(|(slot, opened_by)| {
            let by = match (tried, opened_by.is_empty()) {
                (false, _) => "not tried, give --key".to_owned(),
                (true, true) => "none of the keys given".to_owned(),
                (true, false) => opened_by.join(", "),
            };
            vec![slot.label.clone(), slot.kind().name().to_owned(), detail(slot).unwrap_or_default(), by]
        })
        .collect();
    format!(
        "{} version {}, slots generation {}\n{}",
        printable(&resolved.name),
        resolved.header.seq,
        resolved.slots.generation,
        table(&["label", "kind", "detail", "opened by"], &[false; 4], &lines)
    )
}

/// What a slot says of its key: costs, versions; nothing of the key.
fn detail(slot: &Slot) -> Option<String> {
    match &slot.params {
        SlotParams::Scrypt { log2_n, .. } => Some(format!("N=2^{log2_n}")),
        SlotParams::Argon2id { m_kib, t, p, .. } => Some(format!("m={m_kib}KiB t={t} p={p}")),
        SlotParams::VaultKv { version, .. } => Some(format!("version {version}")),
        SlotParams::VaultTransit => transit_version(slot).map(|version| format!("version {version}")),
        SlotParams::HpkeX25519 { recipient } => Some(format!("recipient {recipient}")),
        SlotParams::Pbkdf2Sha512 { iterations, .. } => Some(format!("iterations={iterations}")),
        SlotParams::Raw { .. } | SlotParams::Unknown { .. } => None,
    }
}

fn add(args: &AddArgs, mut layers: Layers, out: &Out) -> Result<()> {
    args.access.lay(&mut layers);
    let mut reading = reading(&args.store, &layers)?;
    reading.access.need_keys()?;
    let new = new_ring(&reading, std::slice::from_ref(&args.add), "--add")?;
    let edit = Edit::Add { keys: ring(&reading, &reading.access.keys)?, new, label: args.label.clone() };
    let signers = args.signing.releasers(&reading)?;
    edit_one(&mut reading, &args.model, signers, edit, out)
}

fn remove(args: &RemoveArgs, mut layers: Layers, out: &Out) -> Result<()> {
    args.access.lay(&mut layers);
    let mut reading = reading(&args.store, &layers)?;
    reading.access.need_keys()?;
    let edit = Edit::Remove { keys: ring(&reading, &reading.access.keys)?, label: args.label.clone() };
    let signers = args.signing.releasers(&reading)?;
    edit_one(&mut reading, &args.model, signers, edit, out)
}

fn edit_one(reading: &mut Reading, model: &str, signers: Vec<Arc<dyn Signer>>, edit: Edit, out: &Out) -> Result<()> {
    let selector: ModelSelector = model.parse()?;
    let releaser = releaser(reading, &selector.name, signers)?;
    let rotator = Rotator { resolver: reading.resolver(), releaser };
    let done = Done::Edited(runtime()?.block_on(rotator.edit(&selector.wanted, &edit))?);
    tell(reading, &selector.name, &done, None, out)
}

/// What is done to each version.
#[derive(Clone)]
enum Work {
    Edit(Edit),
    Rekey(Box<Rekey>),
}

enum Done {
    Edited(Edited),
    Rekeyed(Rekeyed),
    /// What no tag names any more, after all tags of a model were rotated.
    Withdrawn(Withdrawn),
    /// Left alone, and why.
    Untouched {
        version: u64,
        why: String,
        /// An earlier rotation made it, for other keys than this order's.
        unlike: bool,
    },
}

impl Done {
    fn untouched(version: u64, why: String) -> Done {
        Done::Untouched { version, why, unlike: false }
    }
}

fn rotate(args: &RotateArgs, mut layers: Layers, out: &Out) -> Result<()> {
    args.access.lay(&mut layers);
    let mut reading = reading(&args.store, &layers)?;
    reading.access.need_keys()?;
    let rekeys = args.new_key || args.reencrypt;
    if !args.rewrap && !rekeys && args.to.is_empty() {
        refuse!(Usage, "rotate to what? give --to KEY, --rewrap, --new-key or --reencrypt");
    }
    if !rekeys && (args.withdraw_old || args.if_older.is_some()) {
        refuse!(Usage, "--withdraw-old and --if-older are about new versions; add --new-key or --reencrypt");
    }
    if rekeys && args.label.is_some() {
        refuse!(Usage, "--label names one slot; the slots of a new version are named after their keys, drop it");
    }
    let bar = SealBar::new(out);
    let work = work(args, &reading, &bar)?;
    let releasers = args.signing.releasers(&reading)?;
    if args.all {
        return rotate_all(args, &mut reading, &work, releasers, &bar, out);
    }
    let Some(model) = &args.model else {
        refuse!(Usage, "name a MODEL, or say --all for every model of the store");
    };
    let selector: ModelSelector = model.parse()?;
    let releaser = releaser_for(&mut reading, &selector.name, releasers, &work)?;
    let record = args.register.as_deref().map(|at| prepare_record(args, &reading, at, &selector)).transpose()?;
    let (done, registered) = match (&record, &work) {
        (Some(record), Work::Edit(Edit::Replace { keys, new, label })) => {
            let prepare = Edit::Prepare { keys: Arc::clone(keys), new: Arc::clone(new), label: label.clone() };
            let halves = [&Work::Edit(prepare), &work];
            let (done, registered) =
                replace_around(record, args.register_raw_key, &reading, releaser, &selector, halves)?;
            (Done::Edited(done), registered)
        }
        _ => {
            let done = runtime()?.block_on(rotate_one(&reading, releaser, &selector.wanted, &work));
            bar.end();
            let done = done?;
            let registered = match &record {
                Some(record) => register(record, args.register_raw_key, &reading, &selector.name, &work, &done)?,
                None => None,
            };
            (done, registered)
        }
    };
    tell(&reading, &selector.name, &done, registered.as_ref(), out)?;
    match done {
        // What was to be withdrawn is, for whoever sees the new refs; the floor was the purpose all the same.
        Done::Rekeyed(Rekeyed { unraised: Some(failed), .. }) if args.withdraw_old => Err(failed),
        done => failure(&Ok(done)).map_or(Ok(()), |failed| Err(failed.clone().context("not every slot was rewrapped"))),
    }
}

/// Before anything is rotated: what could not be registered afterwards is refused now.
fn prepare_record(args: &RotateArgs, reading: &Reading, at: &str, selector: &ModelSelector) -> Result<Registration> {
    if !args.rewrap {
        let to = sources(&args.to, "--to")?;
        need_registrable(if to.is_empty() { &reading.access.keys } else { &to }, args.register_raw_key)?;
    }
    let at = at.parse().map_err(|error: Error| error.context("--register"))?;
    let records = catalog::records(reading.vault.as_ref())?;
    let record = Registration::prepare(records, at, &reading.url, &selector.name)?;
    if args.rewrap {
        let version = runtime()?.block_on(rotating(reading).resolve(selector, None))?;
        rewrapped(&version.slots, args.label.as_deref())?;
        record.check_names(version.digest)?;
    }
    Ok(record)
}

/// Replaces a key that a record holds. Both keys open the version until the record has the new one, so that whoever goes by
/// the record opens it at every moment; whatever this dies at, the same order goes on from there.
fn replace_around(
    record: &Registration,
    raw: bool,
    reading: &Reading,
    releaser: Releaser,
    selector: &ModelSelector,
    [prepare, replace]: [&Work; 2],
) -> Result<(Edited, Option<Registered>)> {
    let runtime = runtime()?;
    // A tag may be moved meanwhile: each step is about one version, the one that the record will name.
    let number = runtime.block_on(rotating(reading).resolve(selector, None))?.header.seq;
    let edit =
        |work: &Work| match runtime.block_on(rotate_one(reading, releaser.clone(), &Wanted::Version(number), work))? {
            Done::Edited(edited) => Ok(edited),
            Done::Rekeyed(_) | Done::Withdrawn(_) | Done::Untouched { .. } => unreachable!("both halves are edits"),
        };
    let prepared = edit(prepare)?;
    let done = Done::Edited(prepared.clone());
    let registered = register(record, raw, reading, &selector.name, prepare, &done)
        .map_err(|failed| failed.context(format!("the old key and the new one open version {number} now")))?;
    let replaced = edit(replace).map_err(|failed| {
        failed.context(format!(
            "the record has the new key, and the old one opens version {number} still; run the same command again"
        ))
    })?;
    Ok((prepared.followed_by(replaced), registered))
}

/// Writes the record of what was rotated; `None`: nothing was.
fn register(
    record: &Registration,
    raw: bool,
    reading: &Reading,
    model: &str,
    work: &Work,
    done: &Done,
) -> Result<Option<Registered>> {
    let number = match done {
        Done::Edited(edited) => edited.version,
        Done::Rekeyed(rekeyed) => rekeyed.version,
        Done::Untouched { .. } | Done::Withdrawn(_) => return Ok(None),
    };
    let selector = ModelSelector { name: model.to_owned(), wanted: Wanted::Version(number) };
    let version = runtime()?.block_on(rotating(reading).resolve(&selector, None))?;
    let ring = match work {
        Work::Edit(Edit::Rewrap { label, .. }) => {
            let wrapped = rewrapped(&version.slots, label.as_deref())?;
            return record.rewrap(version.digest, wrapped).map(Some);
        }
        Work::Edit(Edit::Replace { new, .. } | Edit::Prepare { new, .. }) => new,
        Work::Edit(Edit::Add { .. } | Edit::Remove { .. }) => unreachable!("no rotation adds or removes"),
        Work::Rekey(order) => order.to.as_ref().unwrap_or(&order.keys),
    };
    let key = if raw { raw_key_for_record(ring)? } else { transit_for_record(ring, &version)? };
    let size = version.open(ring)?.0.total_size();
    let Ok(size_bytes) = u64::try_from(size) else { refuse!(Usage, "--register: {size} bytes fit no record") };
    record.write(SealedRecord { manifest: version.digest, size_bytes, encryption_key: &key }).map(Some)
}

/// The text of the one transit slot that a record can hold; which of several it would be, nothing says but a label.
fn rewrapped<'a>(slots: &'a Slots, label: Option<&str>) -> Result<&'a str> {
    let named = |slot: &&Slot| transit_version(slot).is_some() && label.is_none_or(|label| slot.label == label);
    let mut found = slots.slots.iter().filter(named);
    match (found.next(), found.next()) {
        (Some(slot), None) => Ok(std::str::from_utf8(&slot.body).expect("its version was read as text")),
        (Some(_), Some(_)) => {
            refuse!(Usage, "--register: the version has several transit slots; say which, --label LABEL")
        }
        (None, _) => refuse!(NotFound, "--register: the version has no transit slot that a record could hold"),
    }
}

/// The transit slot that this ring opens, as a record holds it: that of the first transit key it names, as `seal` does, and of
/// several the newest. Beside one of the same key that is about to go, the new one has a newer version, or stands after it.
fn transit_for_record(ring: &Keys, version: &Resolved) -> Result<Zeroizing<String>> {
    let mut slots: Vec<_> =
        version.slots.slots.iter().filter_map(|slot| Some((transit_version(slot)?, slot))).collect();
    slots.sort_by_key(|(version, _)| *version);
    let is_transit = |source: &KeySource| matches!(source, KeySource::VaultTransit { .. });
    for (number, _) in ring.sources().iter().enumerate().filter(|(_, source)| is_transit(source)) {
        for (_, slot) in slots.iter().rev() {
            if opens_by(ring, number, &version.slots, &version.header, slot)? {
                let text = std::str::from_utf8(&slot.body).expect("its version was read as text");
                return Ok(Zeroizing::new(text.to_owned()));
            }
        }
    }
    refuse!(NoKey, "--register: none of the keys given opens a transit slot of version {}", version.header.seq)
}

fn work(args: &RotateArgs, reading: &Reading, bar: &Arc<SealBar>) -> Result<Work> {
    let keys = ring(reading, &reading.access.keys)?;
    if args.rewrap {
        let vault = rewrapper(reading)?;
        return Ok(Work::Edit(Edit::Rewrap { vault, label: args.label.clone() }));
    }
    if !args.new_key && !args.reencrypt {
        let new = new_ring(reading, &args.to, "--to")?;
        return Ok(Work::Edit(Edit::Replace { keys, new, label: args.label.clone() }));
    }
    let shown = Arc::clone(bar);
    Ok(Work::Rekey(Box::new(Rekey {
        level: if args.reencrypt { Level::Reencrypt } else { Level::NewKey },
        keys,
        to: if args.to.is_empty() { None } else { Some(new_ring(reading, &args.to, "--to")?) },
        publishers: Signers::new(&reading.access).publishers(&args.signing.sign)?,
        // With --all once for each model, when none of its tags names an old version any more.
        withdraw_old: args.withdraw_old && !args.all,
        if_older_s: match &args.if_older {
            Some(text) => Some(parse_duration(text).map_err(|e| e.context("--if-older"))?.as_secs()),
            None if args.all => Some(86_400),
            None => None,
        },
        threads: std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 16),
        progress: ProgressFn::new(move |progress| shown.show(progress)),
    })))
}

/// Vault's transit engine behind the one `--key`.
fn rewrapper(reading: &Reading) -> Result<Arc<dyn Rewrap>> {
    let [KeySource::VaultTransit { mount, key }] = &reading.access.keys[..] else {
        refuse!(Usage, "--rewrap wants exactly one --key, vault-transit:MOUNT/KEY");
    };
    let Some(vault) = reading.vault.clone() else {
        refuse!(Usage, "--rewrap asks Vault; say where it is with --vault-addr or VAULT_ADDR");
    };
    Ok(Arc::new(Transit { vault, at: TransitKey { mount: mount.clone(), key: key.clone() } }))
}

struct Transit {
    vault: Vault,
    at: TransitKey,
}

impl Rewrap for Transit {
    fn rewrap(&self, context: &[u8; 32], wrapped: &str) -> Result<String> {
        self.vault.transit_rewrap(&self.at, context, wrapped)
    }
}

/// As for a tag; and whoever signs versions is believed for them too.
fn releaser_for(reading: &mut Reading, model: &str, releasers: Vec<Arc<dyn Signer>>, work: &Work) -> Result<Releaser> {
    let mut releaser = releaser(reading, model, releasers)?;
    if let Work::Rekey(order) = work {
        let wanted = u64::from(reading.trust().threshold(model, Role::Publisher));
        if (order.publishers.len() as u64) < wanted {
            refuse!(
                Usage,
                "versions of {model} need {wanted} signatures by the trust file, {} are given; give --sign again",
                order.publishers.len()
            );
        }
        let mut publishers: Vec<PublicKey> = reading.trust().keys(model, Role::Publisher);
        publishers.extend(order.publishers.iter().map(|signer| signer.public()));
        publishers.sort_unstable();
        publishers.dedup();
        releaser.chain.publishers = Arc::new(publishers);
    }
    Ok(releaser)
}

fn rotating<'a>(reading: &'a Reading) -> Resolver<'a> {
    let resolver = reading.resolver();
    Resolver { policy: FloorPolicy { freeze_warn: true, ..resolver.policy }, ..resolver }
}

async fn rotate_one(reading: &Reading, releaser: Releaser, wanted: &Wanted, work: &Work) -> Result<Done> {
    let rotator = Rotator { resolver: rotating(reading), releaser };
    match work {
        Work::Edit(edit) => Ok(Done::Edited(rotator.edit(wanted, edit).await?)),
        Work::Rekey(order) => Ok(match rotator.rekey(wanted, order).await? {
            Rekeyed { left_alone: Some(why), version, left_unlike, .. } => {
                Done::Untouched { version, why, unlike: left_unlike }
            }
            rekeyed => Done::Rekeyed(rekeyed),
        }),
    }
}

/// A version that `--all` comes by.
struct Found {
    candidate: Candidate,
    next: Next,
}

enum Next {
    /// As it was found.
    Edit(Edit),
    /// By this name.
    Rotate(Wanted),
    /// This is told instead.
    Leave(Box<Result<Done>>),
}

impl Found {
    fn new(candidate: Candidate, work: &Work) -> Found {
        let (version, tag) = (candidate.wanted.seq, &candidate.channel);
        let next = match (candidate.withdrawn, candidate.is_named(), work) {
            (false, _, Work::Edit(edit)) => Next::Edit(edit.clone()),
            (false, _, Work::Rekey(_)) => Next::Rotate(Wanted::Version(version)),
            // Nobody gets it by its number any more; the readers of the tag do, with the slots that it has.
            (true, true, Work::Edit(_)) => Next::Rotate(Wanted::Tag(tag.clone())),
            // A new version of the same files would bring back what was withdrawn.
            (true, true, Work::Rekey(_)) => Next::Leave(Box::new(Err(Error::new(
                Code::Usage,
                format!(
                    "version {version} was withdrawn and tag {tag} still names it, under the old data key: move the tag to \
                     another version with `modelfs tag`"
                ),
            )))),
            (true, false, _) => Next::Leave(Box::new(Ok(Done::untouched(version, "it was withdrawn".to_owned())))),
        };
        Found { candidate, next }
    }
}

/// The versions of a model that are to be rotated: all that a tag leads to, or for new versions those that tags name. And
/// tags that lead nowhere any more.
async fn versions(reading: &Reading, model: &str, work: &Work) -> Result<(Vec<Found>, Vec<BrokenTag>)> {
    // However many: one that is passed over would keep the key that is to go.
    let Versions { found, broken } = rotating(reading).versions(model, usize::MAX).await?;
    let named = found.into_iter().filter(|candidate| match work {
        Work::Edit(_) => true,
        Work::Rekey(_) => candidate.is_named(),
    });
    Ok((named.map(|candidate| Found::new(candidate, work)).collect(), broken))
}

/// What `--all --withdraw-old` withdraws of a model, once its rows are done; `None`: nothing of it was rotated, or not all.
async fn withdraw(rotator: &Rotator<'_>, rows: &[(String, Option<u64>, Result<Done>)]) -> Option<Result<Done>> {
    let model = &*rotator.releaser.chain.model_name;
    let mut replaced: Vec<&Rekeyed> = Vec::new();
    let mut unlike = None;
    for (_, _, done) in rows.iter().filter(|(name, ..)| name == model) {
        match done {
            Ok(Done::Rekeyed(rekeyed)) => replaced.push(rekeyed),
            Ok(Done::Untouched { version, unlike: true, .. }) => unlike = Some(version),
            Ok(_) => {}
            // Its row says what is wrong; the next run withdraws.
            Err(_) => return None,
        }
    }
    if let Some(version) = unlike {
        return Some(Err(Error::new(
            Code::Usage,
            format!(
                "nothing of {model} was withdrawn: version {version} is what an earlier rotation made, and its slots were changed \
                 since; withdraw what is older with `modelfs tag STORE {model}@{version} TAG --min-version {version}`, or rotate it \
                 again with --if-older 0s"
            ),
        )));
    }
    if replaced.is_empty() {
        return None;
    }
    let old = replaced.iter().map(|rekeyed| (rekeyed.from_version, rekeyed.version)).filter(|(from, to)| from != to);
    let old: Vec<u64> = old.map(|(from, _)| from).collect();
    match rotator.withdraw_below_tags(&old).await {
        Ok(withdrawn) => {
            let told = !withdrawn.refs.is_empty() || !withdrawn.floor_raised;
            told.then(|| Ok(Done::Withdrawn(withdrawn)))
        }
        Err(failed) => Some(Err(failed.context("nothing was withdrawn"))),
    }
}

fn rotate_all(
    args: &RotateArgs,
    reading: &mut Reading,
    work: &Work,
    releasers: Vec<Arc<dyn Signer>>,
    bar: &SealBar,
    out: &Out,
) -> Result<()> {
    let runtime = runtime()?;
    let models = match &args.model {
        Some(name) => {
            crate::format::check_model_name(name).map_err(|e| e.context("MODEL with --all is a bare name"))?;
            vec![name.clone()]
        }
        None => runtime.block_on(reading.model_names())?,
    };
    let counted = out.count(models.len() as u64, "rotate");
    let mut rows: Vec<(String, Option<u64>, Result<Done>)> = Vec::new();
    for model in &models {
        counted.set_message(printable(model));
        let found = releaser_for(reading, model, releasers.clone(), work)
            .and_then(|releaser| Ok((releaser, runtime.block_on(versions(reading, model, work))?)));
        match found {
            Ok((releaser, (versions, broken))) => {
                for Found { candidate, next } in versions {
                    let version = candidate.wanted.seq;
                    let done = match next {
                        Next::Leave(done) => *done,
                        Next::Rotate(wanted) => runtime.block_on(rotate_one(reading, releaser.clone(), &wanted, work)),
                        Next::Edit(edit) => {
                            let rotator = Rotator { resolver: rotating(reading), releaser: releaser.clone() };
                            runtime.block_on(rotator.edit_found(&candidate, &edit)).map(Done::Edited)
                        }
                    };
                    rows.push((model.clone(), Some(version), untouched(done, version, work)));
                }
                for BrokenTag { channel, why, seen_before } in broken {
                    if seen_before {
                        let what = format!(
                            "tag {channel} was made by a trusted key and is broken now: whatever only it leads to keeps its keys"
                        );
                        rows.push((model.clone(), None, Err(why.context(what))));
                    }
                }
                if args.withdraw_old {
                    let rotator = Rotator { resolver: rotating(reading), releaser };
                    let done = runtime.block_on(withdraw(&rotator, &rows));
                    rows.extend(done.map(|done| (model.clone(), None, done)));
                }
            }
            Err(failed) => rows.push((model.clone(), None, Err(failed))),
        }
        bar.end();
        counted.inc(1);
    }
    counted.finish_and_clear();
    let failed = rows.iter().filter(|(_, _, done)| failure(done).is_some()).count();
    for (model, version, done) in &rows {
        let at = version.map_or_else(|| model.clone(), |version| format!("{model}@{version}"));
        for warning in done.as_ref().map_or(&[][..], warnings) {
            out.hint(format!("warning: {}: {warning}", printable(&at)));
        }
    }
    let values: Vec<Value> = rows.iter().map(|(model, version, done)| row(model, *version, done)).collect();
    let value = json!({"store": reading.url.to_string(), "versions": values, "failed": failed});
    out.result(&value, || {
        if values.is_empty() {
            return format!("no model of {} tells its name", reading.url);
        }
        let cell = |value: &Value, name: &str| match &value[name] {
            Value::String(text) => printable(text),
            Value::Null => String::new(),
            other => other.to_string(),
        };
        let lines: Vec<Vec<String>> = values
            .iter()
            .map(|value| ["model", "version", "status", "detail"].map(|name| cell(value, name)).to_vec())
            .collect();
        table(&["model", "version", "status", "detail"], &[false, true, false, false], &lines)
    })?;
    match rows.iter().find_map(|(_, _, done)| failure(done)) {
        Some(first) => {
            let what =
                format!("{failed} of {} were not rotated, or not wholly, listed above; run it again", rows.len());
            Err(Error::new(first.code(), what))
        }
        None => Ok(()),
    }
}

/// What of this a job that runs by itself must not take for done: `min_decryption_version` may be raised after it.
fn failure(done: &Result<Done>) -> Option<&Error> {
    match done {
        Err(failed) => Some(failed),
        Ok(Done::Edited(edited)) => edited.refusal.as_ref(),
        Ok(Done::Withdrawn(withdrawn)) => withdrawn.unfinished.as_ref().or(withdrawn.unraised.as_ref()),
        Ok(Done::Rekeyed(_) | Done::Untouched { .. }) => None,
    }
}

fn warnings(done: &Done) -> &[String] {
    match done {
        Done::Edited(edited) => &edited.warnings,
        Done::Rekeyed(rekeyed) => &rekeyed.warnings,
        Done::Withdrawn(withdrawn) => &withdrawn.warnings,
        Done::Untouched { .. } => &[],
    }
}

/// A version that these keys have no business with is not a failure, but it is told.
fn untouched(done: Result<Done>, version: u64, work: &Work) -> Result<Done> {
    match (done, work) {
        (Err(shut), Work::Edit(Edit::Replace { .. })) if shut.code() == Code::NoKey => {
            Ok(Done::untouched(version, "neither the old nor the new key opens it".to_owned()))
        }
        (Err(none), Work::Edit(Edit::Rewrap { .. })) if none.code() == Code::NotFound => {
            Ok(Done::untouched(version, none.message().to_owned()))
        }
        (done, _) => done,
    }
}

fn row(model: &str, version: Option<u64>, done: &Result<Done>) -> Value {
    let mut value = match done {
        Ok(done) => described(done),
        Err(failed) => json!({"status": "failed", "code": failed.code().name(), "detail": failed.chain()}),
    };
    value["model"] = json!(model);
    value["version"] = json!(version);
    value
}

fn sha256(digest: ManifestDigest) -> String {
    format!("sha256:{digest}")
}

fn described(done: &Done) -> Value {
    let mut value = match done {
        Done::Edited(edited) => serde_json::to_value(edited).expect("plain values are JSON"),
        Done::Rekeyed(rekeyed) => serde_json::to_value(rekeyed).expect("plain values are JSON"),
        Done::Withdrawn(withdrawn) => serde_json::to_value(withdrawn).expect("plain values are JSON"),
        Done::Untouched { version, why, .. } => {
            return json!({"version": version, "status": "untouched", "detail": why});
        }
    };
    let (status, detail) = match done {
        Done::Edited(edited) => {
            value["manifest"] = json!(sha256(edited.manifest));
            let status = match (edited.written, edited.finished) {
                _ if edited.refusal.is_some() => "partial",
                (true, _) => "rotated",
                (false, true) => "finished",
                (false, false) => "unchanged",
            };
            let mut detail = format!("slots generation {}", edited.generation);
            if !edited.refused.is_empty() {
                detail.push_str(&format!(", not rewrapped: {}", edited.refused.join(", ")));
            }
            (status, detail)
        }
        Done::Rekeyed(rekeyed) => {
            value["manifest"] = json!(sha256(rekeyed.manifest));
            value["from_manifest"] = json!(sha256(rekeyed.from_manifest));
            let status = match (rekeyed.finished, rekeyed.refs.is_empty()) {
                (false, _) => "rotated",
                (true, false) => "finished",
                (true, true) => "unchanged",
            };
            let detail = match status {
                "unchanged" => {
                    format!("version {} stands for an older one already, no new data key was made", rekeyed.version)
                }
                "finished" => format!(
                    "version {}, made before, stands for {}; no new data key was made",
                    rekeyed.version, rekeyed.from_version
                ),
                _ => format!("version {} stands for {}", rekeyed.version, rekeyed.from_version),
            };
            (status, detail)
        }
        Done::Withdrawn(withdrawn) => ("withdrawn", format!("every version below {}", withdrawn.below)),
        Done::Untouched { .. } => unreachable!("returned above"),
    };
    value["status"] = json!(status);
    value["detail"] = json!(detail);
    value
}

fn tell(reading: &Reading, model: &str, done: &Done, registered: Option<&Registered>, out: &Out) -> Result<()> {
    for warning in warnings(done) {
        out.hint(format!("warning: {warning}"));
    }
    let mut value = described(done);
    value["store"] = json!(reading.url.to_string());
    value["model"] = json!(model);
    if let Some(registered) = registered {
        value["registered"] = json!(registered);
    }
    out.result(&value, || {
        let mut text = match done {
            Done::Edited(edited) => told_edit(model, edited),
            Done::Rekeyed(rekeyed) => told_rekey(reading, model, rekeyed),
            Done::Withdrawn(_) => unreachable!("told in the table of --all alone"),
            Done::Untouched { version, why, .. } => format!("{model}@{version} was left as it is: {why}"),
        };
        if let Some(Registered { record, version }) = registered {
            let line = if text.ends_with('\n') { "" } else { "\n" };
            text.push_str(&format!("{line}  record    {record} version {version}"));
        }
        text
    })
}

fn told_edit(model: &str, edited: &Edited) -> String {
    let mut text = match (edited.written, edited.finished) {
        (true, _) => format!("{model}@{} has slots generation {} now", edited.version, edited.generation),
        (false, true) => format!("{model}@{} was as wanted; what an earlier run left is done now", edited.version),
        (false, false) => format!("{model}@{} is as wanted already, nothing to do", edited.version),
    };
    for label in &edited.added {
        text.push_str(&format!("\n  added     {label}"));
    }
    for label in &edited.removed {
        text.push_str(&format!("\n  removed   {label}"));
    }
    for (label, from, to) in &edited.rewrapped {
        text.push_str(&format!(
            "\n  rewrapped {label}, version {from} to {to} (by Vault's word: nothing was opened here)"
        ));
    }
    for (tag, ref_seq) in &edited.refs {
        text.push_str(&format!("\n  tag       {tag}, ref {ref_seq}: older slots are refused"));
    }
    text
}

fn told_rekey(reading: &Reading, model: &str, rekeyed: &Rekeyed) -> String {
    let tags: Vec<&str> = rekeyed.refs.iter().map(|(tag, _)| tag.as_str()).collect();
    if rekeyed.finished && tags.is_empty() {
        return format!(
            "{model}@{} stands for an older version already: nothing was done, no new data key was made",
            rekeyed.version
        );
    }
    if rekeyed.finished {
        return format!(
            "{model}@{} stands for version {}, and {} says so now\n  data key    none was made now: an earlier run made this \
             version. Had its key leaked, run it again without --if-older, with a --key that opens it\n",
            rekeyed.version,
            rekeyed.from_version,
            tags.join(", ")
        );
    }
    let mut text = format!(
        "{model}@{} stands for version {} as {}, under a new data key\n  manifest    {}\n  slots       {}\n",
        rekeyed.version,
        rekeyed.from_version,
        tags.join(", "),
        sha256(rekeyed.manifest),
        rekeyed.slots.join(", ")
    );
    if !rekeyed.left_out.is_empty() {
        text.push_str(&format!(
            "  left out    {}: their keys were not given; let them in again with `modelfs key add`\n",
            rekeyed.left_out.join(", ")
        ));
    }
    match rekeyed.level {
        Level::NewKey => text.push_str("  objects     as they were: whoever has the old data key can still read them\n"),
        Level::Reencrypt => text.push_str(&format!(
            "  objects     {} encrypted anew; the old ones stay until `modelfs prune {}` finds that nothing names them\n",
            show_size(rekeyed.reencrypted_bytes),
            reading.url
        )),
    }
    text
}

fn ring(reading: &Reading, sources: &[KeySource]) -> Result<Keys> {
    let ring = Keyring::new(sources, &prompt_terminal).with_vault(reading.vault.clone())?;
    Ok(Arc::new(ring.allow_labels(&reading.access.slot_labels)))
}

fn sources(words: &[String], option: &str) -> Result<Vec<KeySource>> {
    words.iter().map(|word| word.parse().map_err(|e: Error| e.context(option.to_owned()))).collect()
}

fn new_ring(reading: &Reading, words: &[String], option: &str) -> Result<Keys> {
    let sources = sources(words, option)?;
    Ok(Arc::new(Keyring::new(&sources, &prompt_new).for_new_keys().with_vault(reading.vault.clone())?))
}

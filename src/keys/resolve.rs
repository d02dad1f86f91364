//! From a model's name to the one version that may be believed: refs, floor, manifest, signatures, slots.
//!
//! In: a hostile store, local trust, what was seen before. Out: [`Resolved`]: manifest bytes that a trusted publisher signed,
//! and the newest key slots of that version. Nothing is decrypted here.
//! Promises: the order of docs/FORMAT.md D8: ref signature, floor, manifest digest, manifest signature, slots; every
//! object read has a length bound known before; what is remembered changes only after everything held.
//! With a pinned digest no ref is consulted: the digest is the trust.
//! Held by: the tests below, THREAT_MODEL (f) rows 21 to 30, 34, 35.

use bytes::Bytes;
use futures::stream::{self, StreamExt, TryStreamExt};

use super::floor::{FloorPolicy, FloorStore, Note, RefFloor, check_ref, check_slots, check_version};
use super::selector::{ModelSelector, Wanted};
use super::slots::Keyring;
use super::trust::{Role, Tofu, Trust};
use crate::crypto::{Dek, ModelKeys, PublicKey, open_manifest};
use crate::error::{Class, Code, Error, Result};
use crate::format::limits::{MANIFEST_BYTES_MAX, MODEL_NAME_BYTES_MAX, REF_BYTES_MAX, SLOTS_BYTES_MAX};
use crate::format::{
    ChannelId, KeyId, Manifest, ManifestDigest, ManifestHeader, ModelId, Ref, SIGNATURE_LEN, SignatureObject, Slots,
    Vid, manifest_message, names,
};
use crate::refuse;
use crate::store::ChunkSource;

/// The tag that `seal` moves when none is named.
pub const DEFAULT_CHANNEL: &str = "latest";
/// Refs probed one by one before a listing is asked for.
const PROBES_MAX: u32 = 16;
/// How far back in a channel's refs a version number is looked for.
const WALK_MAX: u32 = 4096;
/// How often the newest slots are looked for again because a rotation deleted them just then.
const SLOTS_READS_MAX: u32 = 16;
/// Signers looked at when trusting on first use.
const FIRST_USE_SIGNERS_MAX: usize = 8;
/// `name` objects read at once when a whole store is listed.
const NAMES_AT_ONCE: usize = 16;
/// Tags of one model that are looked at. Each costs requests, and whoever may write the store can make more.
const TAGS_MAX: usize = 1024;
/// Tags looked at at once.
const TAGS_AT_ONCE: usize = 16;
/// Refs of a broken tag that are looked at for what it withdrew.
const SAID_MAX: usize = 64;

/// Unix seconds, from the clock that can be set: the floor judges it.
pub fn unix_now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}

/// One version of a model that may be believed: signed by whom we trust, or pinned; not yet decrypted.
#[derive(Debug, Clone)]
pub struct Resolved {
    pub name: String,
    pub model_id: ModelId,
    /// The tag it was found by; `None` for a pinned digest.
    pub channel: Option<String>,
    /// The ref that names it.
    pub reference: Option<Ref>,
    pub manifest_bytes: Bytes,
    pub header: ManifestHeader,
    pub digest: ManifestDigest,
    pub slots: Slots,
    /// Publishers whose signature over the manifest holds. Empty only for a pinned digest.
    pub signed_by: Vec<KeyId>,
    pub notes: Vec<Note>,
}

impl Resolved {
    pub fn unlock(&self, keyring: &Keyring<'_>) -> Result<Dek> {
        keyring.unlock(&self.slots, &self.header).map_err(|err| err.context(format!("cannot unlock {}", self.name)))
    }

    /// Unlocks and decrypts the manifest.
    pub fn open(&self, keyring: &Keyring<'_>) -> Result<(Manifest, ModelKeys)> {
        open_manifest(&self.manifest_bytes, self.unlock(keyring)?)
    }
}

/// A version that a tag leads to, not yet looked at: its ref, and the newest one of that tag.
#[derive(Debug, Clone)]
pub struct Candidate {
    pub channel: String,
    pub newest: Ref,
    pub wanted: Ref,
    /// Below the floor of some tag of the model.
    pub withdrawn: bool,
    asked: Asked,
}

impl Candidate {
    /// Whether its tag names it now, and not only once did.
    pub fn is_named(&self) -> bool {
        self.wanted == self.newest
    }
}

/// What the tags of a model lead to.
#[derive(Debug)]
pub struct Versions {
    /// Those that tags name first, each once.
    pub found: Vec<Candidate>,
    /// What these lead to is not, or not wholly, among them.
    pub broken: Vec<BrokenTag>,
}

/// A tag that the store shows and that is not believed: somebody else's, or no longer what was signed.
#[derive(Debug)]
pub struct BrokenTag {
    pub channel: String,
    pub why: Error,
    /// It was believed before: what it named is still somebody's.
    pub seen_before: bool,
}

/// Everything that decides which version is believed.
#[derive(Debug, Clone, Copy)]
pub struct Resolver<'a> {
    pub source: &'a dyn ChunkSource,
    pub trust: &'a Trust,
    /// Trust on first use, when that was asked for by name.
    pub first_use: Option<&'a Tofu>,
    /// Where versions seen are remembered; `None` remembers nothing.
    pub floors: Option<&'a FloorStore>,
    pub policy: FloorPolicy,
    /// Unix seconds; [`unix_now`] but in tests.
    pub now: fn() -> i64,
}

/// Whose signatures count for one model.
struct Believed {
    publishers: Vec<PublicKey>,
    releasers: Vec<PublicKey>,
    publishers_min: u32,
    releasers_min: u32,
    first_use: bool,
}

/// The lowest version and slots generation that are still allowed, by the newest refs and by what is remembered.
#[derive(Debug, Clone, Copy)]
struct Asked {
    min_version_seq: u64,
    min_slots_generation: u32,
}

/// A tag of a model: its newest ref, believed, and what is remembered of it.
struct Head {
    channel: String,
    believed: Believed,
    floor: Option<RefFloor>,
    newest: Ref,
}

/// All tags of a model: what was withdrawn under one of them is withdrawn whichever leads there.
#[derive(Default)]
struct Tags {
    heads: Vec<Head>,
    /// Of tags that the store no longer shows, or shows broken.
    gone: Vec<RefFloor>,
    /// Of broken tags the newest refs that are still believed: they lead nowhere, and what they withdrew stays withdrawn.
    said: Vec<Ref>,
    broken: Vec<BrokenTag>,
}

impl Tags {
    /// Of a version with this vid.
    fn ask(&self, vid: Vid) -> Asked {
        let floors = || self.heads.iter().filter_map(|head| head.floor.as_ref()).chain(&self.gone);
        let refs = || self.heads.iter().map(|head| &head.newest).chain(&self.said);
        let named = refs().filter(|newest| newest.vid == vid);
        let seqs = refs().map(|newest| newest.min_version_seq);
        let remembered = floors().filter_map(|floor| floor.slots_generations.get(&vid.to_string()).copied());
        Asked {
            min_version_seq: seqs.chain(floors().map(|floor| floor.min_version_seq)).max().unwrap_or(0),
            min_slots_generation: named.map(|newest| newest.min_slots_generation).chain(remembered).max().unwrap_or(0),
        }
    }
}

impl Head {
    fn broken(&self, name: &str, why: Error) -> BrokenTag {
        broken_tag(name, self.channel.clone(), why, self.floor.is_some() || !self.believed.first_use)
    }
}

/// What is found under a tag.
enum Look {
    Believed(Believed, Ref),
    /// Why, and the newest refs that are believed all the same.
    Broken(Error, Vec<Ref>),
}

/// A model and channel, as one thing to pass around.
#[derive(Clone, Copy)]
struct Channel<'c> {
    model: ModelId,
    name: &'c str,
    channel: &'c str,
}

impl Resolver<'_> {
    /// The version that `selector` names, or the one with digest `pin`.
    ///
    /// # Errors
    /// `NO_TRUST`; those of the ref (`REF_*`, `ROLLBACK`, `FORK`, `FAST_FORWARD`, `CLOCK`, `BELOW_FLOOR`, `NO_FLOOR`), of the
    /// manifest (`MAN_*`), of the slots (`SLOTS_*`, `SLOT_*`, `DEK_COMMIT`); `NOT_FOUND`; the store's own.
    ///
    /// # Cancel safety
    /// Remembers nothing unless it ends.
    pub async fn resolve(&self, selector: &ModelSelector, pin: Option<ManifestDigest>) -> Result<Resolved> {
        match (pin, &selector.wanted) {
            (Some(digest), wanted) => self.pinned(&selector.name, wanted, digest).await,
            (None, Wanted::Newest) => self.newest_of(&selector.name, DEFAULT_CHANNEL).await,
            (None, Wanted::Tag(tag)) => self.newest_of(&selector.name, tag).await,
            (None, Wanted::Version(seq)) => self.version_of(&selector.name, *seq).await,
            // Metrics are encrypted: `versions::best` chooses among the candidates with the keys.
            (None, Wanted::Best { .. }) => refuse!(Usage, "choosing a version by its metrics needs a key"),
        }
        .map_err(|err| err.context(format!("cannot resolve {selector} in {}", self.source.describe())))
    }

    /// The newest ref of a channel, signed and judged against the floor: what a publisher continues from.
    ///
    /// # Errors
    /// `NOT_FOUND` if the channel has no ref yet; else as [`Resolver::resolve`].
    pub async fn newest_ref(&self, name: &str, channel: &str) -> Result<Ref> {
        let at = Channel { model: ModelId::of_name(name), name, channel };
        let believed = self.believed(at).await?;
        let floor = self.floor(at)?;
        let newest = self.newest(at, &believed, floor.as_ref()).await?;
        check_ref(floor.as_ref(), &FloorPolicy { freeze_warn: true, ..self.policy }, (self.now)(), &newest)?;
        Ok(newest)
    }

    /// The tags of a model that the store shows, sorted, `latest` first.
    pub async fn channels(&self, name: &str) -> Result<Vec<String>> {
        let dirs = self.source.list_dirs(&names::refs_dir(ModelId::of_name(name))).await?;
        let mut channels: Vec<String> = dirs.iter().filter_map(|dir| names::channel(dir)).map(str::to_owned).collect();
        channels.sort_by_key(|channel| (*channel != DEFAULT_CHANNEL, channel.clone()));
        Ok(channels)
    }

    /// Every version that the tags of a model lead to and that was not withdrawn, those that tags name first, each once; at
    /// most `versions_max`. A version withdrawn under one tag is withdrawn under all. A tag that has expired or is broken leads
    /// nowhere.
    ///
    /// # Errors
    /// As [`Resolver::resolve`]; `NOT_FOUND`, or `REF_EXPIRED` or what a tag is broken by if that is why there is none.
    pub async fn candidates(&self, name: &str, versions_max: usize) -> Result<Vec<Candidate>> {
        let mut found = self.versions(name, versions_max).await?.found;
        found.retain(|candidate| !candidate.withdrawn);
        if found.is_empty() {
            refuse!(NotFound, "every version of {name} that a tag leads to was withdrawn");
        }
        Ok(found)
    }

    /// The same with those that were withdrawn: a tag that names one still shows it to its readers.
    ///
    /// # Errors
    /// As [`Resolver::candidates`].
    pub async fn versions(&self, name: &str, versions_max: usize) -> Result<Versions> {
        let model = ModelId::of_name(name);
        let mut tags = self.tags(name).await?;
        if tags.heads.first().is_some_and(|lead| lead.believed.first_use) {
            tags = self.led_by(name, 0, tags).await?;
        }
        let mut broken = std::mem::take(&mut tags.broken);
        let (mut heads, mut expired): (Vec<&Head>, Option<Error>) = (Vec::new(), None);
        for head in &tags.heads {
            match check_ref(head.floor.as_ref(), &self.policy, (self.now)(), &head.newest) {
                Ok(_) => heads.push(head),
                Err(old) if old.code() == Code::RefExpired => {
                    tracing::warn!(channel = head.channel, "{}", old.chain());
                    expired = Some(old);
                }
                Err(why) if counts_for_nothing(&why) => broken.push(head.broken(name, why)),
                Err(err) => return Err(err),
            }
        }
        let mut found: Vec<Candidate> = Vec::new();
        let mut take = |head: &Head, wanted: Ref| {
            let known = found.iter().any(|other| other.wanted.manifest_digest == wanted.manifest_digest);
            if !known && found.len() < versions_max {
                let asked = tags.ask(wanted.vid);
                let withdrawn = wanted.seq < asked.min_version_seq.max(self.policy.min_version_seq);
                found.push(Candidate { channel: head.channel.clone(), newest: head.newest, wanted, withdrawn, asked });
            }
            found.len() == versions_max
        };
        // What a tag names is found by that tag, though the refs of another one lead there too.
        for head in &heads {
            take(head, head.newest);
        }
        for head in &heads {
            let at = Channel { model, name, channel: &head.channel };
            match self.walk_back(at, head.newest, |wanted| take(head, *wanted)).await {
                Ok(_) => {}
                Err(why) if counts_for_nothing(&why) => broken.push(head.broken(name, why)),
                Err(err) => return Err(err),
            }
        }
        match expired {
            Some(expired) if found.is_empty() => Err(expired),
            Some(_) | None if !found.is_empty() => Ok(Versions { found, broken }),
            Some(_) | None => match broken.into_iter().next() {
                Some(broken) => Err(broken.why),
                None => refuse!(NotFound, "the store has no version of {name}"),
            },
        }
    }

    /// The version of a candidate, verified like any other.
    ///
    /// # Errors
    /// As [`Resolver::resolve`].
    pub async fn take(&self, name: &str, candidate: &Candidate) -> Result<Resolved> {
        let at = Channel { model: ModelId::of_name(name), name, channel: &candidate.channel };
        let believed = self.believed(at).await?;
        let floor = self.floor(at)?;
        let (mut newest, wanted) = (candidate.newest, candidate.wanted);
        // We moved the tag ourselves since, perhaps: what is remembered is the least that its newest ref may be.
        if floor.as_ref().is_some_and(|floor| floor.max_ref_seq > newest.ref_seq) {
            newest = self.newest(at, &believed, floor.as_ref()).await?;
        }
        self.finish(at, &believed, floor, newest, wanted, candidate.asked).await.map_err(|err| {
            err.context(format!("cannot resolve {name}@{} in {}", candidate.wanted.seq, self.source.describe()))
        })
    }

    /// Names of the models of a store, sorted; those sealed with a hidden name are not among them.
    pub async fn model_names(&self) -> Result<Vec<String>> {
        let ids = self.source.list_dirs("").await?;
        let ids: Vec<ModelId> = ids.iter().filter_map(|dir| names::model_id(dir)).collect();
        let read = |model| async move {
            match self.source.read_small(&names::model_name(model), MODEL_NAME_BYTES_MAX as u64).await {
                Ok(bytes) => Ok(names::believed_name(model, &bytes).map(str::to_owned)),
                Err(err) if matches!(err.code(), Code::NotFound | Code::Limit) => Ok(None),
                Err(err) => Err(err),
            }
        };
        let found: Vec<Option<String>> =
            stream::iter(ids).map(read).buffer_unordered(NAMES_AT_ONCE).try_collect().await?;
        let mut found: Vec<String> = found.into_iter().flatten().collect();
        found.sort_unstable();
        Ok(found)
    }

    async fn newest_of(&self, name: &str, channel: &str) -> Result<Resolved> {
        let at = Channel { model: ModelId::of_name(name), name, channel };
        let believed = self.believed(at).await?;
        let floor = self.floor(at)?;
        let newest = self.newest(at, &believed, floor.as_ref()).await?;
        let asked = Asked { min_version_seq: newest.min_version_seq, min_slots_generation: 0 };
        self.finish(at, &believed, floor, newest, newest, asked).await
    }

    /// Looks for a version number in `latest`, then in the other channels; it must be allowed by all of them.
    async fn version_of(&self, name: &str, seq: u64) -> Result<Resolved> {
        let model = ModelId::of_name(name);
        let mut tags = self.tags(name).await?;
        let mut found = None;
        for (number, head) in tags.heads.iter().enumerate() {
            let at = Channel { model, name, channel: &head.channel };
            match self.walk_back(at, head.newest, |here| here.seq == seq).await {
                Ok(Some(wanted)) => {
                    found = Some((number, wanted));
                    break;
                }
                Ok(None) => {}
                // Another tag may lead there.
                Err(why) if counts_for_nothing(&why) => tags.broken.push(head.broken(name, why)),
                Err(err) => return Err(err),
            }
        }
        let Some((number, wanted)) = found else {
            let nobody = tags.heads.is_empty();
            match tags.broken.into_iter().find(|tag| nobody || tag.seen_before) {
                Some(broken) => return Err(broken.why),
                None => refuse!(NotFound, "no tag of {name} leads to a version {seq}"),
            }
        };
        if tags.heads[number].believed.first_use {
            tags = self.led_by(name, number, tags).await?;
        } else {
            tags.heads.swap(0, number);
        }
        let (head, asked) = (&tags.heads[0], tags.ask(wanted.vid));
        let at = Channel { model, name, channel: &head.channel };
        self.finish(at, &head.believed, head.floor.clone(), head.newest, wanted, asked).await
    }

    /// Every tag that the store shows, and what is remembered of those that it does not. A broken one is no error: whoever
    /// may write the store can make a tag, and takes no version away from the readers of the others by that.
    ///
    /// # Errors
    /// `LIMIT` for more tags than are looked at; `STATE`; the store's own.
    async fn tags(&self, name: &str) -> Result<Tags> {
        let model = ModelId::of_name(name);
        let mut channels = self.channels(name).await?;
        let shown = channels.len();
        if shown > TAGS_MAX {
            refuse!(
                Limit,
                "the store shows {shown} tags of {name}, and at most {TAGS_MAX} are looked at for what they withdraw; ask for \
                 a tag or a digest instead of a number, and remove the tags that nobody made on purpose"
            );
        }
        let floors = match self.floors {
            Some(floors) => {
                let store = self.source.describe();
                let remembered = floors.readable_channels(&store, model)?;
                let gone: Vec<String> = remembered.into_iter().filter(|channel| !channels.contains(channel)).collect();
                channels.extend(gone);
                floors.load_all(&store, model, &channels)?
            }
            None => vec![None; shown],
        };
        let mut known = channels.into_iter().zip(floors);
        let shown: Vec<(String, Option<RefFloor>)> = known.by_ref().take(shown).collect();
        let mut tags = Tags { gone: known.filter_map(|(_, floor)| floor).collect(), ..Tags::default() };
        let look = |(channel, floor): (String, Option<RefFloor>)| async move {
            let read = self.look(Channel { model, name, channel: &channel }, floor.as_ref()).await;
            (channel, floor, read)
        };
        let looks: Vec<_> = stream::iter(shown).map(look).buffered(TAGS_AT_ONCE).collect().await;
        for (channel, floor, read) in looks {
            let mut is_ours = floor.is_some();
            let why = match read? {
                Look::Believed(believed, newest) => {
                    tags.heads.push(Head { channel, believed, floor, newest });
                    continue;
                }
                Look::Broken(why, said) => {
                    // Nobody but a signer that is trusted makes such a ref, and of this very tag.
                    is_ours |= !said.is_empty();
                    tags.said.extend(said);
                    why
                }
            };
            // An empty folder is no tag, unless there was one.
            if why.code() != Code::NotFound || is_ours {
                tags.broken.push(broken_tag(name, channel, why, is_ours));
            }
            tags.gone.extend(floor);
        }
        Ok(tags)
    }

    async fn look(&self, at: Channel<'_>, floor: Option<&RefFloor>) -> Result<Look> {
        let believed = match self.believed(at).await {
            Ok(believed) => believed,
            Err(why) if why.code() == Code::NotFound || counts_for_nothing(&why) => {
                return Ok(Look::Broken(why, Vec::new()));
            }
            Err(err) => return Err(err),
        };
        match self.newest(at, &believed, floor).await {
            Ok(newest) => Ok(Look::Believed(believed, newest)),
            Err(why) if why.code() == Code::NotFound || counts_for_nothing(&why) => {
                let said = if believed.first_use { Vec::new() } else { self.last_said(at, &believed).await? };
                Ok(Look::Broken(why, said))
            }
            Err(err) => Err(err),
        }
    }

    /// The newest refs of a broken tag that are believed, by its numbers and by its hint: rubbish after or in place of the last
    /// one must not bring back what it withdrew.
    async fn last_said(&self, at: Channel<'_>, believed: &Believed) -> Result<Vec<Ref>> {
        let listed = self.source.list(&names::channel_dir(at.model, at.channel)).await?;
        let mut seqs: Vec<u64> = listed.iter().filter_map(|object| names::ref_seq(&object.name)).collect();
        seqs.sort_unstable_by(|a, b| b.cmp(a));
        seqs.truncate(SAID_MAX);
        let mut said = Vec::from_iter(self.hinted(at, believed).await?);
        for seq in seqs {
            match self.read_ref(at, believed, seq).await {
                Ok(Some(last)) => {
                    said.push(last);
                    break;
                }
                Ok(None) => {}
                Err(bad) if counts_for_nothing(&bad) => {}
                Err(err) => return Err(err),
            }
        }
        Ok(said)
    }

    /// The tag at `number` first, and of the others those whose refs verify under its keys too. For first use: its signers are
    /// the ones that will be believed, and whoever may write the store offers keys for a tag of its own.
    async fn led_by(&self, name: &str, number: usize, mut tags: Tags) -> Result<Tags> {
        let model = ModelId::of_name(name);
        tags.heads.swap(0, number);
        let mut heads = std::mem::take(&mut tags.heads).into_iter();
        tags.heads.extend(heads.next());
        for head in heads {
            let at = Channel { model, name, channel: &head.channel };
            match self.read_ref(at, &tags.heads[0].believed, head.newest.ref_seq).await {
                Ok(Some(again)) if again == head.newest => tags.heads.push(head),
                Ok(_) => {}
                Err(why) if counts_for_nothing(&why) => tags.broken.push(head.broken(name, why)),
                Err(err) => return Err(err),
            }
        }
        Ok(tags)
    }

    /// The newest ref that `is_it` takes. Older refs are believed by the hash that the signed next one carries.
    async fn walk_back(
        &self,
        at: Channel<'_>,
        newest: Ref,
        mut is_it: impl FnMut(&Ref) -> bool,
    ) -> Result<Option<Ref>> {
        let mut here = newest;
        for _ in 0..WALK_MAX {
            if is_it(&here) {
                return Ok(Some(here));
            }
            if here.ref_seq == 1 {
                return Ok(None);
            }
            let name = names::reference(at.model, at.channel, here.ref_seq - 1);
            let bytes = match self.source.read_small(&name, REF_BYTES_MAX as u64).await {
                Ok(bytes) => bytes,
                // Pruned: what lies further back is not there either.
                Err(err) if err.code() == Code::NotFound => return Ok(None),
                Err(err) => return Err(as_code(err, Code::RefLength)),
            };
            let (before, _) = Ref::parse(&bytes)?;
            if before.head_digest() != here.previous {
                refuse!(Fork, "ref {} is not the one that ref {} follows", here.ref_seq - 1, here.ref_seq);
            }
            here = before;
        }
        Ok(None)
    }

    /// From an accepted ref to a resolved version. `newest` is the one to remember, `wanted` names the version, which must be
    /// what is `asked` and what is remembered.
    async fn finish(
        &self,
        at: Channel<'_>,
        believed: &Believed,
        floor: Option<RefFloor>,
        newest: Ref,
        wanted: Ref,
        asked: Asked,
    ) -> Result<Resolved> {
        let floor = floor.as_ref();
        let mut notes = check_ref(floor, &self.policy, (self.now)(), &newest)?;
        check_version(floor, &self.policy, asked.min_version_seq, wanted.seq)?;
        let digest = wanted.manifest_digest;
        let manifest_bytes = self.manifest(at.model, digest, Some(wanted.manifest_len)).await?;
        let signed_by = self.signers(at.model, digest, wanted.seq, believed).await?;
        let (header, _) = ManifestHeader::parse_object(&manifest_bytes)?;
        if (header.model_id, header.vid, header.seq) != (at.model, wanted.vid, wanted.seq) {
            refuse!(ManModel, "manifest {digest} is not version {} of {}, which its ref says", wanted.seq, at.name);
        }
        let slots = self.slots(&header).await?;
        let least = asked.min_slots_generation.max(wanted.min_slots_generation);
        check_slots(floor, least, header.vid, slots.generation)?;

        if believed.first_use {
            if let Some(tofu) = self.first_use {
                let mut keys = [&believed.publishers[..], &believed.releasers].concat();
                keys.sort_unstable();
                keys.dedup();
                tofu.record(&self.source.describe(), (at.model, at.name), &keys)?;
            }
            notes.push(Note::FirstUse);
        }
        if let Some(floors) = self.floors {
            let slots = (header.vid, slots.generation);
            floors.advance(&self.source.describe(), (at.model, at.name), at.channel, &newest, slots)?;
        }
        Ok(Resolved {
            name: at.name.into(),
            model_id: at.model,
            channel: Some(at.channel.into()),
            reference: Some(wanted),
            manifest_bytes,
            header,
            digest,
            slots,
            signed_by,
            notes,
        })
    }

    /// The digest came from our own configuration: it is the trust, and no ref is consulted. A publisher we do trust for
    /// this model must still have signed.
    async fn pinned(&self, name: &str, wanted: &Wanted, digest: ManifestDigest) -> Result<Resolved> {
        let model_id = ModelId::of_name(name);
        let manifest_bytes = self.manifest(model_id, digest, None).await?;
        let (header, _) = ManifestHeader::parse_object(&manifest_bytes)?;
        if header.model_id != model_id {
            refuse!(ManModel, "manifest {digest} is of another model than {name}");
        }
        if let Wanted::Version(seq) = wanted
            && *seq != header.seq
        {
            refuse!(Usage, "manifest {digest} is version {}, not {seq}", header.seq);
        }
        let signed_by = if self.trust.covers(name) {
            self.signers(model_id, digest, header.seq, &self.trusted(name)).await?
        } else {
            Vec::new()
        };
        let slots = self.slots(&header).await?;
        Ok(Resolved {
            name: name.into(),
            model_id,
            channel: None,
            reference: None,
            manifest_bytes,
            header,
            digest,
            slots,
            signed_by,
            notes: Vec::new(),
        })
    }

    /// The version with this digest, which somebody else's word named (a catalog's): a publisher whom we trust for `name`
    /// must have signed it. No ref is consulted.
    ///
    /// # Errors
    /// `NO_TRUST` if no key is trusted for `name`; `MAN_*`, `SLOTS_*`, `NOT_FOUND`; the store's own.
    pub async fn signed_pin(&self, name: &str, digest: ManifestDigest) -> Result<Resolved> {
        if !self.trust.covers(name) {
            refuse!(NoTrust, "no key is trusted for {name}; give --trust KEY, or name one in the trust file");
        }
        self.pinned(name, &Wanted::Newest, digest).await
    }

    fn floor(&self, at: Channel<'_>) -> Result<Option<RefFloor>> {
        match self.floors {
            Some(floors) => floors.load(&self.source.describe(), at.model, at.channel),
            None => Ok(None),
        }
    }

    fn trusted(&self, name: &str) -> Believed {
        Believed {
            publishers: self.trust.keys(name, Role::Publisher),
            releasers: self.trust.keys(name, Role::Release),
            publishers_min: self.trust.threshold(name, Role::Publisher),
            releasers_min: self.trust.threshold(name, Role::Release),
            first_use: false,
        }
    }

    async fn believed(&self, at: Channel<'_>) -> Result<Believed> {
        if self.trust.covers(at.name) {
            return Ok(self.trusted(at.name));
        }
        let Some(tofu) = self.first_use else {
            refuse!(NoTrust, "no key is trusted for {}; give --trust KEY, or --trust-on-first-use", at.name);
        };
        let of = |publishers: Vec<PublicKey>, releasers, first_use| Believed {
            publishers,
            releasers,
            publishers_min: 1,
            releasers_min: 1,
            first_use,
        };
        let recorded = tofu.recorded(&self.source.describe(), at.model)?;
        if !recorded.is_empty() {
            return Ok(of(recorded.clone(), recorded, false));
        }
        // Nobody is known: believe whoever signed what the store shows. The store's word, once, because it was asked for.
        let Some(seq) = self.listed(at).await? else { return Err(no_refs(at)) };
        let bytes = self.source.read_small(&names::reference(at.model, at.channel, seq), REF_BYTES_MAX as u64).await;
        let (shown, signatures) = Ref::parse(&bytes.map_err(|err| as_code(err, Code::RefLength))?)?;
        let signers = signatures.iter().map(|signature| signature.key_id).collect();
        let releasers = self.offered_keys(at.model, signers).await?;
        let listed = self.source.list(&names::signatures_dir(at.model, shown.manifest_digest)).await?;
        let signers = listed.iter().filter_map(|object| names::key_id(&object.name)).collect();
        let publishers = self.offered_keys(at.model, signers).await?;
        if releasers.is_empty() || publishers.is_empty() {
            refuse!(NoTrust, "the store offers no public keys for {}; give --trust KEY", at.name);
        }
        Ok(of(publishers, releasers, true))
    }

    /// Public keys that the store keeps under their ids.
    async fn offered_keys(&self, model: ModelId, ids: Vec<KeyId>) -> Result<Vec<PublicKey>> {
        let mut keys = Vec::new();
        for id in ids.into_iter().take(FIRST_USE_SIGNERS_MAX) {
            let bytes = match self.source.read_small(&names::public_key(model, id), 32).await {
                Ok(bytes) => bytes,
                Err(err) if matches!(err.code(), Code::NotFound | Code::Limit) => continue,
                Err(err) => return Err(err),
            };
            let Ok(bytes) = <[u8; 32]>::try_from(&bytes[..]) else { continue };
            match PublicKey::from_bytes(bytes) {
                Ok(key) if key.key_id() == id => keys.push(key),
                Ok(_) | Err(_) => tracing::warn!("the store offers a public key that is not the one of id {id}"),
            }
        }
        Ok(keys)
    }

    /// The newest ref of a channel: from the hint or what was seen, forward until nothing is there; or from a listing.
    async fn newest(&self, at: Channel<'_>, believed: &Believed, floor: Option<&RefFloor>) -> Result<Ref> {
        let hint = self.hinted(at, believed).await?.map(|hint| hint.ref_seq);
        let start = hint.max(floor.map(|floor| floor.max_ref_seq));
        let started = match start {
            Some(seq) => self.read_ref(at, believed, seq).await?,
            None => None,
        };
        let mut newest = match started {
            Some(found) => found,
            None => match self.listed(at).await? {
                Some(seq) => self.read_ref(at, believed, seq).await?.ok_or_else(|| no_refs(at))?,
                None => return Err(no_refs(at)),
            },
        };
        for _ in 0..PROBES_MAX {
            let Some(seq) = newest.ref_seq.checked_add(1) else { return Ok(newest) };
            let Some(next) = self.read_ref(at, believed, seq).await? else { return Ok(newest) };
            if next.previous != newest.head_digest() {
                refuse!(Fork, "ref {seq} of {} does not follow ref {}", at.name, newest.ref_seq);
            }
            newest = next;
        }
        match self.listed(at).await? {
            Some(seq) if seq > newest.ref_seq => self.read_ref(at, believed, seq).await?.ok_or_else(|| no_refs(at)),
            Some(_) | None => Ok(newest),
        }
    }

    /// What `head` says, if its signature holds: anyone who can write the store can write a hint.
    async fn hinted(&self, at: Channel<'_>, believed: &Believed) -> Result<Option<Ref>> {
        match self.source.read_small(&names::head(at.model, at.channel), REF_BYTES_MAX as u64).await {
            Ok(bytes) => match verify_ref(&bytes, at, believed) {
                Ok(hint) => Ok(Some(hint)),
                Err(err) => {
                    tracing::warn!("hint at the newest version of {} is not believed: {}", at.name, err.chain());
                    Ok(None)
                }
            },
            Err(err) if matches!(err.code(), Code::NotFound | Code::Limit) => Ok(None),
            Err(err) => Err(err),
        }
    }

    async fn listed(&self, at: Channel<'_>) -> Result<Option<u64>> {
        let listed = self.source.list(&names::channel_dir(at.model, at.channel)).await?;
        Ok(listed.iter().filter_map(|object| names::ref_seq(&object.name)).max())
    }

    /// The ref with this number, or `None` if there is none. One that does not verify is refused, not passed over.
    async fn read_ref(&self, at: Channel<'_>, believed: &Believed, seq: u64) -> Result<Option<Ref>> {
        let name = names::reference(at.model, at.channel, seq);
        let bytes = match self.source.read_small(&name, REF_BYTES_MAX as u64).await {
            Ok(bytes) => bytes,
            Err(err) if err.code() == Code::NotFound => return Ok(None),
            Err(err) => return Err(as_code(err, Code::RefLength)),
        };
        let found = verify_ref(&bytes, at, believed)?;
        if found.ref_seq != seq {
            refuse!(Rollback, "ref {seq} of {} is a copy of ref {}", at.name, found.ref_seq);
        }
        Ok(Some(found))
    }

    /// Manifest bytes with this digest; `len` is the signed length, where a ref says one.
    async fn manifest(&self, model: ModelId, digest: ManifestDigest, len: Option<u64>) -> Result<Bytes> {
        let bytes = self.source.read_small(&names::manifest(model, digest), len.unwrap_or(MANIFEST_BYTES_MAX)).await;
        let bytes = bytes.map_err(|err| as_code(err, Code::ManLen))?;
        if let Some(len) = len
            && bytes.len() as u64 != len
        {
            refuse!(ManLen, "manifest {digest} is {} bytes long, its ref says {len}", bytes.len());
        }
        if ManifestDigest::of(&bytes) != digest {
            refuse!(ManDigest, "manifest {digest} has other bytes than those that were signed");
        }
        Ok(bytes)
    }

    /// The trusted publishers whose signature over the manifest holds; enough of them, or `MAN_SIG`.
    async fn signers(
        &self,
        model: ModelId,
        digest: ManifestDigest,
        seq: u64,
        believed: &Believed,
    ) -> Result<Vec<KeyId>> {
        let message = manifest_message(digest, model, seq);
        let mut signed_by = Vec::new();
        let mut why = "no trusted publisher signed it".to_owned();
        for key in &believed.publishers {
            let id = key.key_id();
            let bytes = match self.source.read_small(&names::signature(model, digest, id), SIGNATURE_LEN as u64).await {
                Ok(bytes) => bytes,
                Err(err) if err.code() == Code::NotFound => continue,
                Err(err) if err.code() == Code::Limit => {
                    why = format!("the signature of {id} is too long");
                    continue;
                }
                Err(err) => return Err(err),
            };
            match SignatureObject::parse(&bytes) {
                Ok(object) if object.key_id != id || object.manifest_digest != digest => {
                    why = format!("the signature of {id} is of another key or manifest");
                }
                Ok(object) if key.verify_strict(&message, &object.signature) => signed_by.push(id),
                Ok(_) => why = format!("the signature of {id} does not hold"),
                Err(err) => why = err.message().to_owned(),
            }
        }
        if (signed_by.len() as u64) < u64::from(believed.publishers_min) {
            let (have, want) = (signed_by.len(), believed.publishers_min);
            refuse!(ManSig, "manifest {digest} has {have} of {want} publisher signatures: {why}");
        }
        Ok(signed_by)
    }

    /// The newest key slots of the version that `header` describes.
    async fn slots(&self, header: &ManifestHeader) -> Result<Slots> {
        let (model, vid) = (header.model_id, header.vid);
        let mut vanished = None;
        // A rotation may delete the generation between the listing and the read: once more.
        for _ in 0..SLOTS_READS_MAX {
            let listed = self.source.list(&names::slots_dir(model, vid)).await?;
            let newest = listed.iter().filter_map(|object| names::slots_generation(&object.name)).max();
            let Some(generation) = newest else { refuse!(NotFound, "version {vid} has no key slots in the store") };
            let bytes =
                match self.source.read_small(&names::slots(model, vid, generation), SLOTS_BYTES_MAX as u64).await {
                    Ok(bytes) => bytes,
                    Err(err) if err.code() == Code::NotFound => {
                        vanished = Some(err);
                        continue;
                    }
                    Err(err) => return Err(as_code(err, Code::SlotsLimit)),
                };
            let slots = Slots::parse(&bytes)?;
            if slots.generation != generation {
                refuse!(SlotsRollback, "slots generation {generation} is a copy of generation {}", slots.generation);
            }
            if (slots.model_id, slots.vid) != (model, vid) {
                refuse!(SlotsModel, "slots of version {vid} are those of version {}", slots.vid);
            }
            if slots.dek_commit != header.dek_commit {
                refuse!(DekCommit, "slots generation {generation} is for another key than the signed one");
            }
            return Ok(slots);
        }
        Err(vanished.expect("every round ended with a vanished object"))
    }
}

/// A ref of this model and channel with enough signatures of releasers we trust.
///
/// # Errors
/// Those of [`Ref::parse`]; `REF_SIG` if the signature of a trusted key does not hold; `REF_KEY` for too few different
/// trusted keys; `REF_MODEL`, `REF_CHANNEL`.
fn verify_ref(bytes: &[u8], at: Channel<'_>, believed: &Believed) -> Result<Ref> {
    let (reference, signatures) = Ref::parse(bytes)?;
    let message = reference.message();
    let mut signed_by: Vec<KeyId> = Vec::new();
    for signature in &signatures {
        let Some(key) = believed.releasers.iter().find(|key| key.key_id() == signature.key_id) else { continue };
        if !key.verify_strict(&message, &signature.signature) {
            refuse!(
                RefSig,
                "ref {} of {}: the signature of {} does not hold",
                reference.ref_seq,
                at.name,
                signature.key_id
            );
        }
        if !signed_by.contains(&signature.key_id) {
            signed_by.push(signature.key_id);
        }
    }
    let (have, want) = (signed_by.len() as u64, u64::from(believed.releasers_min));
    if have < want {
        refuse!(RefKey, "ref {} of {} has {have} of {want} signatures by trusted keys", reference.ref_seq, at.name);
    }
    if reference.model_id != at.model {
        refuse!(RefModel, "ref {} is of another model than {}", reference.ref_seq, at.name);
    }
    if reference.channel_id != ChannelId::of_name(at.channel) {
        refuse!(RefChannel, "ref {} of {} is of another tag than {}", reference.ref_seq, at.name, at.channel);
    }
    Ok(reference)
}

/// Whether this is about what a tag says, which its readers alone need to believe; not about the store or this machine.
fn counts_for_nothing(why: &Error) -> bool {
    why.code() == Code::NoTrust || (why.class() == Class::Tampered && why.code() != Code::StoreAnswer)
}

fn broken_tag(name: &str, channel: String, why: Error, seen_before: bool) -> BrokenTag {
    tracing::warn!(channel, seen_before, "a tag of {name} leads nowhere: {}", why.chain());
    BrokenTag { channel, why, seen_before }
}

fn no_refs(at: Channel<'_>) -> Error {
    Error::new(Code::NotFound, format!("the store has no version of {} under the tag {}", at.name, at.channel))
}

/// An object longer than its kind can be is refused by the code of its kind.
fn as_code(err: Error, code: Code) -> Error {
    match err.code() {
        Code::Limit => Error::new(code, err.message().to_owned()).with_source(err),
        _ => err,
    }
}

#[cfg(test)]
#[path = "resolve_tests.rs"]
mod tests;

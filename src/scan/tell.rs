//! What is told of what was found: findings with their layers, what hides them and what to do; places that count as unread.
//!
//! In: what a walk found in one target ([`Found`]), when all its documents are read: only then is it known which blobs are
//! layers, of which images, and which of them a later layer hides. Out: entries of a [`Report`].
//! Promises: what was found in a blob that no image names is told too; a layer that an image names and that was not looked
//! at, or not to its end, counts as unread.
//! Not here: how a target is walked (`walk`), what a document says (`image`).
//! Held by: tests/scan.rs.

use std::collections::{BTreeMap, HashSet};

use super::detect::Verdict;
use super::image::{Documents, Hides, Image, Layer};
use super::source::Trouble;
use super::{
    Confidence, Finding, Format, ImageSeen, Kind, LayerOf, Placement, Report, TargetSeen, UNREAD_MAX, Unread, shown,
};

/// What was found in one target.
#[derive(Default)]
pub(super) struct Found {
    pub archive: bool,
    /// What lies in no blob.
    pub loose: Unit,
    pub blobs: BTreeMap<Vec<u8>, Unit>,
    pub texts: BTreeMap<Vec<u8>, Vec<u8>>,
    pub texts_bytes: usize,
    pub links: BTreeMap<Vec<u8>, Vec<u8>>,
    pub unread: Vec<Unread>,
    pub unread_untold: u64,
}

/// What was found in one blob, or in all that lies in none.
#[derive(Default)]
pub(super) struct Unit {
    /// Of a blob, its name as far as it is unpacked. Not in any place: what lies in a layer has no other name before it.
    pub name: Vec<u8>,
    pub findings: Vec<Seeing>,
    pub untold: u64,
    /// Places in it that could not be read to the end, and why, though others may read them.
    pub unread: Vec<(Vec<Vec<u8>>, String)>,
    pub unread_untold: u64,
    /// Folders that hold a model's configuration.
    pub folders: HashSet<u64>,
    pub hides: Hides,
    pub trouble: Option<Trouble>,
    /// Packed in a way that is not unpacked here.
    pub closed: Option<&'static str>,
    /// Its own bytes, when images are verified.
    pub sha256: Option<[u8; 32]>,
    /// It is an archive as it lies there, not a packed one.
    pub plain: bool,
}

pub(super) struct Seeing {
    /// From the outermost archive inwards.
    pub places: Vec<Vec<u8>>,
    pub verdict: Verdict,
    pub bytes: Option<u64>,
    pub sha256: Option<[u8; 32]>,
}

pub(super) struct Telling<'a> {
    pub target: &'a str,
    pub number: &'a dyn Fn(&[u8]) -> u64,
    pub complete: bool,
    /// Archives that merely lie somewhere were to be looked into.
    pub archives: bool,
}

impl Telling<'_> {
    pub fn tell(&self, mut found: Found, is_file: bool, layout: bool, report: &mut Report) {
        let documents = Documents { texts: &found.texts, links: &found.links };
        let is_image = layout || (found.archive && documents.is_image());
        let (images, lacks) = if is_image { documents.images() } else { Default::default() };
        let kind = match (is_image, found.archive, is_file) {
            (true, ..) => Kind::Image,
            (false, true, _) => Kind::Archive,
            (false, false, true) => Kind::File,
            (false, false, false) => Kind::Tree,
        };
        // What came through before the time was over says nothing about what is missing.
        if self.complete {
            for why in lacks {
                self.unread(report, b"", why, true);
            }
            if is_image && images.is_empty() {
                self.unread(report, b"", "it says that it holds images, and names none".into(), true);
            }
            self.check_layers(&images, &found.blobs, &found.texts, report);
        }
        report.unread.append(&mut found.unread);
        report.unread_untold += found.unread_untold;
        let folders = std::mem::take(&mut found.loose.folders);
        self.take(found.loose, None, &folders, report);
        // Archives that no image makes layers merely lie there.
        if !is_image && !self.archives {
            found.blobs.clear();
        }
        let hides: BTreeMap<Vec<u8>, Hides> =
            found.blobs.iter_mut().map(|(key, unit)| (key.clone(), std::mem::take(&mut unit.hides))).collect();
        let mut layers = 0;
        for (key, mut unit) in found.blobs {
            let placed: Vec<(&Image, usize)> = images
                .iter()
                .flat_map(|image| {
                    let at = image.layers.iter().enumerate().filter(|(_, layer)| layer.key == key);
                    at.map(move |(at, _)| (image, at))
                })
                .collect();
            layers += u64::from(!placed.is_empty());
            match unit.trouble.take() {
                // Of an archive that is no image, a broken archive in it is what it is in a tree.
                Some(Trouble::Broken(why)) if !is_image => {
                    let verdict = Verdict {
                        format: Format::Archive,
                        confidence: Confidence::Info,
                        why: format!("broken from some point on: {why}"),
                        beside_config: false,
                    };
                    unit.findings.push(Seeing { places: Vec::new(), verdict, bytes: None, sha256: None });
                }
                Some(Trouble::Time) | None => {}
                Some(trouble) => {
                    let hostile = matches!(trouble, Trouble::Broken(_) | Trouble::Limit(_));
                    self.unread(report, &key, trouble.to_string(), hostile);
                }
            }
            if let Some(kind) = unit.closed
                && is_image
            {
                // It says so itself.
                unit.findings.retain(|seeing| !seeing.places.is_empty() || seeing.verdict.format != Format::Archive);
                self.unread(report, &key, closed(kind), true);
            }
            self.take(unit, Some((&key, &placed, &hides)), &folders, report);
        }
        report.looked.layers += layers;
        let images =
            images.iter().map(|image| ImageSeen { name: shown(image.name.as_bytes()), layers: image.layers.len() });
        report.targets.push(TargetSeen { path: self.target.to_owned(), kind, images: images.collect() });
    }

    /// Every layer that an image names has to have been looked at, and be what its digest says where that was asked.
    fn check_layers(
        &self,
        images: &[Image],
        blobs: &BTreeMap<Vec<u8>, Unit>,
        texts: &BTreeMap<Vec<u8>, Vec<u8>>,
        report: &mut Report,
    ) {
        let mut seen = HashSet::new();
        for image in images {
            for layer in image.layers.iter().filter(|layer| seen.insert(&layer.key)) {
                match blobs.get(&layer.key) {
                    // Documents are no layers, but artifacts and attestations keep some where layers stand.
                    None if texts.contains_key(&layer.key) => {}
                    None => {
                        let why = format!("a layer of {} that is not in the archive", image.name);
                        self.unread(report, &layer.key, why, true);
                    }
                    Some(unit) => {
                        if let Some(why) = mismatch(layer, unit) {
                            self.unread(report, &layer.key, why, true);
                        }
                    }
                }
            }
        }
        for (key, unit) in blobs {
            if let (Some(seen), Some(wanted)) = (unit.sha256, key.strip_prefix(b"blobs/sha256/"))
                && hex::encode(seen).as_bytes() != wanted
            {
                self.unread(report, key, "its content is not what its digest says".into(), true);
            }
        }
    }

    fn unread(&self, report: &mut Report, path: &[u8], why: String, hostile: bool) {
        if report.unread.len() >= UNREAD_MAX {
            report.unread_untold += 1;
            return;
        }
        report.unread.push(Unread { target: self.target.to_owned(), path: shown(path), why, hostile });
    }

    #[allow(clippy::type_complexity, reason = "one call, two lines above")]
    fn take(
        &self,
        unit: Unit,
        blob: Option<(&[u8], &[(&Image, usize)], &BTreeMap<Vec<u8>, Hides>)>,
        loose_folders: &HashSet<u64>,
        report: &mut Report,
    ) {
        report.findings_untold += unit.untold;
        report.unread_untold += unit.unread_untold;
        for (places, why) in unit.unread {
            let place: Vec<&[u8]> = blob.iter().map(|(key, ..)| *key).chain(places.iter().map(Vec::as_slice)).collect();
            self.unread(report, &place.join(&b'!'), why, true);
        }
        for seeing in unit.findings {
            let place = seeing.places.join(&b'!');
            // What a blob itself is lies in the archive's folders, what lies in it in its own.
            let (folders, beside) = match blob {
                Some((key, ..)) if seeing.places.is_empty() => (loose_folders, key),
                Some(_) => (&unit.folders, &place[..]),
                None => (loose_folders, &place[..]),
            };
            if seeing.verdict.beside_config && !folders.contains(&(self.number)(folder_of(beside))) {
                continue;
            }
            let mut path = place;
            let mut layer = None;
            if let Some((key, placed, hides)) = blob {
                if placed.is_empty() {
                    path = if path.is_empty() { key.to_vec() } else { [key, b"!", &path].concat() };
                } else {
                    let first = seeing.places.first().map_or(&[][..], |first| first);
                    layer = Some(self.layer(key, placed, hides, first));
                    if path.is_empty() {
                        path = key.to_vec();
                    }
                }
            }
            report.findings.push(Finding {
                format: seeing.verdict.format,
                confidence: seeing.verdict.confidence,
                target: self.target.to_owned(),
                path: shown(&path),
                bytes: seeing.bytes,
                sha256: seeing.sha256.map(hex::encode),
                fix: fix(&seeing.verdict, layer.as_ref()),
                layer,
                why: seeing.verdict.why,
            });
        }
    }

    fn layer(&self, key: &[u8], placed: &[(&Image, usize)], hides: &BTreeMap<Vec<u8>, Hides>, path: &[u8]) -> LayerOf {
        let images = placed.iter().map(|(image, at)| {
            let above = image.layers.iter().enumerate().skip(at + 1);
            let hidden_by = above.filter_map(|(above, layer)| {
                let how = hides.get(&layer.key)?.hides(path, self.number)?;
                Some((above + 1, how))
            });
            Placement {
                image: shown(image.name.as_bytes()),
                position: at + 1,
                of: image.layers.len(),
                created_by: image.layers[*at].created_by.as_ref().map(|line| shown(line.as_bytes())),
                hidden_by: hidden_by.into_iter().next(),
            }
        });
        let digest = placed.iter().find_map(|(image, at)| {
            let layer = &image.layers[*at];
            layer.digest.clone().or_else(|| layer.diff_id.clone())
        });
        LayerOf { file: shown(key), digest: digest.map(|digest| shown(digest.as_bytes())), images: images.collect() }
    }
}

/// Whether a layer's bytes are not those of its digest, as far as they were hashed.
fn mismatch(layer: &Layer, unit: &Unit) -> Option<String> {
    let seen = format!("sha256:{}", hex::encode(unit.sha256?));
    // A blob under its digest's own name is looked at with all other blobs.
    let wanted = layer.digest.as_ref().filter(|_| !layer.key.starts_with(b"blobs/"));
    let wanted = wanted.or_else(|| layer.diff_id.as_ref().filter(|_| unit.plain))?;
    (*wanted != seen).then(|| format!("its content is {seen}, and the image says {wanted}"))
}

fn fix(verdict: &Verdict, layer: Option<&LayerOf>) -> String {
    let serve = "seal the model (`modelfs seal DIR STORE NAME`) and mount it when the container runs";
    match (verdict.format, layer) {
        (Format::Sealed | Format::Archive | Format::Opaque, _) => "nothing, if it is what it should be".to_owned(),
        (_, None) => format!("{serve}; remove this file"),
        (_, Some(layer)) if layer.images.iter().any(|image| image.hidden_by.is_some()) => format!(
            "{serve}; a later layer hides the file and takes nothing away: leave it out of the step that adds it, or \
             delete it in that same step, and build again"
        ),
        (_, Some(_)) => format!("{serve}; leave the file out of the step that adds it, and build again"),
    }
}

pub(super) fn closed(kind: &str) -> String {
    format!("packed with {kind}, which is not unpacked here")
}

pub(super) fn folder_of(path: &[u8]) -> &[u8] {
    path.iter().rposition(|byte| *byte == b'/').map_or(&[][..], |at| &path[..at])
}

//! What an archive says of its images, laid over what was found in its files: which blob is which layer of what, who made
//! it, and which later layer hides what an earlier one holds.
//!
//! In: the JSON documents of a docker-save archive or an OCI layout (hostile) and the names that its layers were found
//! under. Out: [`Image`]s, and what they name that is not there.
//! Promises: total; indexes are followed to a depth and a number; a layer that an image names is found or its lack is told.
//! Spec: OCI image-spec 1.1 (index, manifest, config, layer, whiteouts); manifest.json as `docker save` writes it.
//! Held by: the tests below, tests/scan.rs, tests/scan.sh with images of docker and podman.

use std::collections::{BTreeMap, HashSet};

use serde_json::Value;

/// Indexes within indexes.
const INDEX_DEPTH_MAX: usize = 8;

/// Manifests of one archive, and layers of one image. Engines stop at 127 layers.
const MANIFESTS_MAX: usize = 4096;
const LAYERS_MAX: usize = 4096;

/// One image of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Image {
    /// Its tags, else its platform, else its digest.
    pub name: String,
    pub layers: Vec<Layer>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layer {
    /// The file of the archive that holds it.
    pub key: Vec<u8>,
    /// Of the blob as it lies there, where the image says so.
    pub digest: Option<String>,
    /// Of the plain layer.
    pub diff_id: Option<String>,
    /// The line of the build that made it.
    pub created_by: Option<String>,
}

/// The documents of an archive by name, and its links.
pub(super) struct Documents<'a> {
    pub texts: &'a BTreeMap<Vec<u8>, Vec<u8>>,
    pub links: &'a BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Documents<'_> {
    pub fn is_image(&self) -> bool {
        let classic = self.json(b"manifest.json").is_some_and(|value| {
            value.as_array().and_then(|all| all.first()).is_some_and(|first| first.get("Layers").is_some())
        });
        let layout = self.json(b"index.json").is_some_and(|value| value.get("manifests").is_some());
        classic || layout
    }

    fn json(&self, key: &[u8]) -> Option<Value> {
        serde_json::from_slice(self.texts.get(key)?).ok()
    }

    /// Where a name leads that may be a link, as those of older archives to a layer that two images share.
    fn resolve(&self, name: &[u8]) -> Vec<u8> {
        let mut at = clean(name);
        for _ in 0..8 {
            let Some(target) = self.links.get(&at) else { break };
            let folder = at.iter().rposition(|byte| *byte == b'/').map_or(&[][..], |end| &at[..end]);
            at = clean(&[folder, b"/", target].concat());
        }
        at
    }

    /// All images, and what is named and cannot be read.
    pub fn images(&self) -> (Vec<Image>, Vec<String>) {
        let mut found: Vec<Image> = Vec::new();
        let mut lacks = Vec::new();
        if let Some(Value::Array(entries)) = self.json(b"manifest.json") {
            for entry in entries.iter().take(MANIFESTS_MAX) {
                self.classic(entry, &mut found, &mut lacks);
            }
        }
        if let Some(index) = self.json(b"index.json") {
            let mut seen = HashSet::new();
            self.index(&index, None, 0, &mut seen, &mut found, &mut lacks);
        }
        // The newer docker-save writes both forms of the same images.
        let mut merged: Vec<Image> = Vec::new();
        for image in found {
            let same = |have: &&mut Image| {
                have.layers.iter().map(|layer| &layer.key).eq(image.layers.iter().map(|layer| &layer.key))
            };
            match merged.iter_mut().find(same) {
                None => merged.push(image),
                Some(have) => {
                    if !have.name.contains('/') && !have.name.contains(':') {
                        have.name = image.name;
                    }
                    for (have, more) in have.layers.iter_mut().zip(image.layers) {
                        have.digest = have.digest.take().or(more.digest);
                        have.diff_id = have.diff_id.take().or(more.diff_id);
                        have.created_by = have.created_by.take().or(more.created_by);
                    }
                }
            }
        }
        (merged, lacks)
    }

    fn classic(&self, entry: &Value, found: &mut Vec<Image>, lacks: &mut Vec<String>) {
        let config_name = entry.get("Config").and_then(Value::as_str).unwrap_or_default();
        let tags: Vec<&str> =
            entry.get("RepoTags").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect();
        let name = if tags.is_empty() { config_name.to_owned() } else { tags.join(", ") };
        let Some(layers) = entry.get("Layers").and_then(Value::as_array) else {
            lacks.push(format!("the image {name} names no layers"));
            return;
        };
        let config = self.json(&self.resolve(config_name.as_bytes()));
        if config.is_none() {
            lacks.push(format!("the configuration {config_name} of {name} is not there or no JSON"));
        }
        let keys = layers.iter().take(LAYERS_MAX).filter_map(Value::as_str);
        let keys = keys.map(|key| (self.resolve(key.as_bytes()), None)).collect();
        found.push(Image { name, layers: described(keys, config.as_ref()) });
    }

    fn index(
        &self,
        index: &Value,
        name: Option<&str>,
        depth: usize,
        seen: &mut HashSet<String>,
        found: &mut Vec<Image>,
        lacks: &mut Vec<String>,
    ) {
        if depth >= INDEX_DEPTH_MAX {
            lacks.push(format!("indexes lie within each other more than {INDEX_DEPTH_MAX} deep"));
            return;
        }
        for entry in index.get("manifests").and_then(Value::as_array).into_iter().flatten() {
            let Some(digest) = entry.get("digest").and_then(Value::as_str) else {
                lacks.push("an index names a manifest without a digest".into());
                continue;
            };
            if !seen.insert(digest.to_owned()) {
                continue;
            }
            if seen.len() > MANIFESTS_MAX {
                lacks.push(format!("more than {MANIFESTS_MAX} manifests"));
                return;
            }
            let own = named(entry, name, digest);
            let Some(key) = blob(digest) else {
                lacks.push(format!("`{digest}` is no digest"));
                continue;
            };
            match self.json(&key) {
                // Of an image for many platforms an engine exports those that it has.
                None if depth > 0 && !self.texts.contains_key(&key) => {}
                None => lacks.push(format!("the manifest {digest} of {own} is not there or no JSON")),
                Some(inner) if inner.get("manifests").is_some() => {
                    self.index(&inner, Some(&own), depth + 1, seen, found, lacks);
                }
                Some(manifest) => self.manifest(&manifest, own, found, lacks),
            }
        }
    }

    fn manifest(&self, manifest: &Value, name: String, found: &mut Vec<Image>, lacks: &mut Vec<String>) {
        let config = manifest.pointer("/config/digest").and_then(Value::as_str).and_then(blob);
        let config = config.and_then(|key| self.json(&key));
        let mut keys = Vec::new();
        for layer in manifest.get("layers").and_then(Value::as_array).into_iter().flatten().take(LAYERS_MAX) {
            let digest = layer.get("digest").and_then(Value::as_str).unwrap_or_default();
            match blob(digest) {
                Some(key) => keys.push((key, Some(digest.to_owned()))),
                None => lacks.push(format!("`{digest}`, a layer of {name}, is no digest")),
            }
        }
        found.push(Image { name, layers: described(keys, config.as_ref()) });
    }
}

/// What an entry of an index calls itself, with the name of the index above it.
fn named(entry: &Value, above: Option<&str>, digest: &str) -> String {
    let text = |path: &str| entry.pointer(path).and_then(Value::as_str).map(str::to_owned);
    let annotation =
        |key: &str| entry.get("annotations").and_then(|all| all.get(key)).and_then(Value::as_str).map(str::to_owned);
    let tag = annotation("io.containerd.image.name").or_else(|| annotation("org.opencontainers.image.ref.name"));
    let platform = text("/platform/architecture").map(|architecture| {
        let system = text("/platform/os").unwrap_or_default();
        let variant = text("/platform/variant").map_or(String::new(), |variant| format!("/{variant}"));
        format!("{system}/{architecture}{variant}")
    });
    match (tag.or_else(|| above.map(str::to_owned)), platform) {
        (Some(tag), Some(platform)) => format!("{tag} ({platform})"),
        (Some(name), None) | (None, Some(name)) => name,
        (None, None) => digest.to_owned(),
    }
}

/// The layers with what the configuration tells of each.
fn described(keys: Vec<(Vec<u8>, Option<String>)>, config: Option<&Value>) -> Vec<Layer> {
    let history = config.and_then(|config| config.get("history")).and_then(Value::as_array);
    let mut lines = history.into_iter().flatten().filter(|line| {
        // Lines that made no layer, as ENV and CMD.
        line.get("empty_layer").and_then(Value::as_bool) != Some(true)
    });
    let diff_ids = config.and_then(|config| config.pointer("/rootfs/diff_ids")).and_then(Value::as_array);
    let mut diff_ids = diff_ids.into_iter().flatten();
    keys.into_iter()
        .map(|(key, digest)| Layer {
            key,
            digest,
            diff_id: diff_ids.next().and_then(Value::as_str).map(str::to_owned),
            created_by: lines.next().and_then(|line| line.get("created_by")?.as_str()).map(shortened),
        })
        .collect()
}

/// A command of a build on one line, not endless.
fn shortened(line: &str) -> String {
    const CHARS_MAX: usize = 300;
    let words = line.split_whitespace().collect::<Vec<_>>().join(" ");
    match words.char_indices().nth(CHARS_MAX) {
        Some((at, _)) => format!("{}...", &words[..at]),
        None => words,
    }
}

/// Where a layout keeps the blob of a digest.
fn blob(digest: &str) -> Option<Vec<u8>> {
    let (kind, hex) = digest.split_once(':')?;
    let word = |text: &str, more: fn(u8) -> bool| !text.is_empty() && text.bytes().all(more);
    let sound = word(kind, |byte| byte.is_ascii_alphanumeric()) && word(hex, |byte| byte.is_ascii_hexdigit());
    sound.then(|| format!("blobs/{kind}/{hex}").into_bytes())
}

/// A path of an archive without `./`, doubled slashes and `..`, so that one name has one form.
pub(super) fn clean(path: &[u8]) -> Vec<u8> {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join(&b'/')
}

/// What a layer takes away from those below it. Paths as numbers: only whether one is there is ever asked.
#[derive(Debug, Default)]
pub(super) struct Hides {
    /// Files and links, which replace what had the name.
    replaced: Vec<u64>,
    /// Names with a whiteout.
    deleted: Vec<u64>,
    /// Folders whose former content is gone.
    emptied: Vec<u64>,
}

/// How a layer hides a file of one below it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Hidden {
    Deleted,
    Replaced,
}

impl Hides {
    /// Notes one entry of a layer that is no folder. `number` makes a number of a path.
    pub fn note(&mut self, path: &[u8], number: impl Fn(&[u8]) -> u64) {
        let path = clean(path);
        let (folder, name) = match path.iter().rposition(|byte| *byte == b'/') {
            Some(at) => (&path[..at], &path[at + 1..]),
            None => (&[][..], &path[..]),
        };
        match name.strip_prefix(b".wh.") {
            Some(b".wh..opq") => self.emptied.push(number(folder)),
            Some(gone) if folder.is_empty() => self.deleted.push(number(gone)),
            Some(gone) => self.deleted.push(number(&[folder, b"/", gone].concat())),
            None => self.replaced.push(number(&path)),
        }
    }

    pub fn finish(&mut self) {
        for list in [&mut self.replaced, &mut self.deleted, &mut self.emptied] {
            list.sort_unstable();
            list.dedup();
            list.shrink_to_fit();
        }
    }

    /// Whether a file of a lower layer is not seen any more in this one.
    pub fn hides(&self, path: &[u8], number: impl Fn(&[u8]) -> u64) -> Option<Hidden> {
        let path = clean(path);
        let has = |list: &[u64], path: &[u8]| list.binary_search(&number(path)).is_ok();
        if has(&self.deleted, &path) {
            return Some(Hidden::Deleted);
        }
        if has(&self.replaced, &path) {
            return Some(Hidden::Replaced);
        }
        let mut end = path.len();
        while let Some(at) = path[..end].iter().rposition(|byte| *byte == b'/') {
            let folder = &path[..at];
            if has(&self.deleted, folder) || has(&self.emptied, folder) {
                return Some(Hidden::Deleted);
            }
            if has(&self.replaced, folder) {
                return Some(Hidden::Replaced);
            }
            end = at;
        }
        has(&self.emptied, b"").then_some(Hidden::Deleted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(path: &[u8]) -> u64 {
        use std::hash::{DefaultHasher, Hash, Hasher};
        let mut hasher = DefaultHasher::new();
        path.hash(&mut hasher);
        hasher.finish()
    }

    fn hides(entries: &[&str], path: &str) -> Option<Hidden> {
        let mut hides = Hides::default();
        for entry in entries {
            hides.note(entry.as_bytes(), number);
        }
        hides.finish();
        hides.hides(path.as_bytes(), number)
    }

    #[test]
    fn whiteouts_hide_a_file_its_folder_or_all_that_was_in_it() {
        assert_eq!(hides(&["opt/.wh.w"], "opt/w"), Some(Hidden::Deleted));
        assert_eq!(hides(&["./.wh.opt"], "/opt/a/w"), Some(Hidden::Deleted));
        assert_eq!(hides(&["opt/.wh..wh..opq"], "opt/a/w"), Some(Hidden::Deleted));
        assert_eq!(hides(&[".wh..wh..opq"], "w"), Some(Hidden::Deleted));
        assert_eq!(hides(&["opt/w"], "opt/w"), Some(Hidden::Replaced));
        assert_eq!(hides(&["opt"], "opt/w"), Some(Hidden::Replaced));
        for others in [["opt/.wh.v"], ["opt/w2"], ["op/.wh..wh..opq"], ["opt/w/.wh..wh..opq"]] {
            assert_eq!(hides(&others, "opt/w"), None, "{others:?}");
        }
    }

    fn documents(texts: &[(&str, Value)]) -> BTreeMap<Vec<u8>, Vec<u8>> {
        texts.iter().map(|(name, value)| (name.as_bytes().to_vec(), value.to_string().into_bytes())).collect()
    }

    #[test]
    fn lines_of_the_build_go_to_the_layers_they_made_and_links_are_followed() {
        use serde_json::json;
        let texts = documents(&[
            (
                "manifest.json",
                json!([{"Config": "c.json", "RepoTags": ["a:1"], "Layers": ["x/layer.tar", "y/layer.tar"]}]),
            ),
            (
                "c.json",
                json!({"history": [{"created_by": "ADD"}, {"created_by": "ENV", "empty_layer": true},
                {"created_by": "COPY  a\n b"}], "rootfs": {"diff_ids": ["sha256:1", "sha256:2"]}}),
            ),
        ]);
        let links = BTreeMap::from([(b"y/layer.tar".to_vec(), b"../x/layer.tar".to_vec())]);
        let (images, lacks) = Documents { texts: &texts, links: &links }.images();
        assert_eq!(lacks, Vec::<String>::new());
        assert_eq!(images[0].name, "a:1");
        assert_eq!(images[0].layers[1].created_by.as_deref(), Some("COPY a b"));
        assert!(images[0].layers.iter().all(|layer| layer.key == b"x/layer.tar"));
    }

    #[test]
    fn an_index_that_names_itself_ends_and_what_is_not_there_is_told() {
        use serde_json::json;
        let itself = format!("sha256:{}", "ab".repeat(32));
        let own = format!("blobs/sha256/{}", "ab".repeat(32));
        let index = json!({"manifests": [{"digest": itself}]});
        let texts = documents(&[("index.json", index.clone()), (&own, index)]);
        let links = BTreeMap::new();
        let (images, _) = Documents { texts: &texts, links: &links }.images();
        assert!(images.is_empty());
        let texts = documents(&[("index.json", json!({"manifests": [{"digest": "sha256:00"}, {"digest": "../x"}]}))]);
        let (_, lacks) = Documents { texts: &texts, links: &links }.images();
        assert_eq!(lacks.len(), 2, "{lacks:?}");
    }
}

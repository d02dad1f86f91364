//! Everything that is wrong with a configuration, all of it, without starting anything.
//!
//! In: the layers, what could not be laid, for whom, and the places of a mount as far as they are known. Out: findings.
//! Promises: what would refuse the start is among them; a value that may be a secret is in none; nothing is changed, no
//! secret is read, nobody is asked over a network.
//! `doctor` judges a configuration by the same findings.
//! Held by: tests/config.rs, `doctor::tests`.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::layers::Layers;
use super::options::{OPTIONS, Use, takes};
use super::rules::{self, Level, Said};
use super::{MountPlan, Oversight, check_mountpoint, store_options, vault};
use crate::error::{Error, Result};
use crate::fuse::inherited;
use crate::store::StoreUrl;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    pub level: Level,
    pub about: About,
    pub text: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum About {
    /// What is said: one value, or several together.
    Said,
    /// A file that an option names, and what it is for.
    File(Use),
    /// What nobody has said yet and no mount is without: a key, a signer.
    Unsaid,
}

/// The two places of a mount, as typed, where they are known.
#[derive(Debug, Clone, Copy, Default)]
pub struct Places<'a> {
    pub store: Option<&'a str>,
    pub mountpoint: Option<&'a Path>,
}

#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    /// What one part finds, another may find too, alone or among others.
    fn add(&mut self, level: Level, about: About, text: String) {
        if !self.0.iter().any(|finding| text.contains(&finding.text) || finding.text.contains(&text)) {
            self.0.push(Finding { level, about, text });
        }
    }

    fn refused<T>(&mut self, done: Result<T>) -> Option<T> {
        self.refused_about(About::Said, done)
    }

    fn refused_about<T>(&mut self, about: About, done: Result<T>) -> Option<T> {
        done.map_err(|error| self.add(Level::Refused, about, error.chain())).ok()
    }
}

/// `who`: bits of [`takes`]. `whole` makes the plan of a driver; a mount's is made here.
pub fn findings(
    layers: &Layers,
    errors: Vec<Error>,
    who: u16,
    places: Places<'_>,
    whole: impl FnOnce() -> Result<()>,
) -> Vec<Finding> {
    let mut found = Findings::default();
    for error in errors.into_iter().chain(layers.wrong()) {
        found.add(Level::Refused, About::Said, error.chain());
    }
    for spec in OPTIONS {
        found.refused(layers.parse_all(spec.name, |value| spec.check(value)));
    }
    found.refused(store_options(layers));
    found.refused(vault::vault_settings(layers));
    found.refused(Oversight::from_layers(layers));

    let store = places.store.and_then(|store| found.refused(layers.store(store)));
    let handed_over = |mountpoint: &Path| inherited::number_in(mountpoint).is_some();
    let mountpoint = places.mountpoint.filter(|path| !handed_over(path));
    let mountpoint = mountpoint.and_then(|path| found.refused(check_mountpoint(path)));
    let said = Said { store: store.as_ref(), mountpoint: mountpoint.as_deref(), ..Said::of_process(layers) };
    for (rule, text) in rules::broken(&said, who) {
        found.add(rule.level, About::Said, text);
    }
    if who & takes::MOUNT != 0 {
        // The records of a catalog bring their keys, and no signers.
        if !matches!(store, Some(StoreUrl::VaultKv { .. })) {
            found.refused_about(About::Unsaid, super::need_keys(layers));
        }
        found.refused_about(About::Unsaid, super::need_signer(layers));
    }
    files(layers, who, &mut found);
    for told in layers.told() {
        found.add(Level::Warned, About::Said, told.clone());
    }
    // The whole has parts that nobody else looks at; where a part is wrong already, it says the same again.
    if found.0.iter().all(|finding| finding.level == Level::Warned || finding.about == About::Unsaid) {
        let whole = match (places.store, places.mountpoint) {
            (Some(store), Some(mountpoint)) if who & takes::MOUNT != 0 && !handed_over(mountpoint) => {
                MountPlan::from_layers(layers, store, mountpoint, false).map(drop)
            }
            _ => whole(),
        };
        found.refused(whole);
    }
    found.0
}

/// Files that are read must be there, and closed to others where they hold a secret.
fn files(layers: &Layers, who: u16, found: &mut Findings) {
    for spec in OPTIONS.iter().filter(|spec| spec.is_taken_by(who)) {
        let Some(setting) = layers.get(spec.name) else { continue };
        for (value, (path, kind)) in setting.values.iter().filter_map(|value| Some((value, spec.paths(value)?))) {
            let named = spec.shown(value).map(|_| path.display().to_string());
            let shown = named.as_deref().unwrap_or("a file whose name may be a secret");
            let about = About::File(kind);
            match (kind, path.metadata()) {
                (Use::Read | Use::Secret, Err(e)) => {
                    found.add(Level::Refused, about, format!("{setting}: {shown} cannot be looked at: {e}"));
                }
                // A pod's token is written by the kubelet, in the modes that it chooses.
                (Use::Secret, Ok(meta)) if meta.mode() & 0o077 != 0 && spec.name != "vault-jwt-file" => {
                    let mode = meta.mode() & 0o7777;
                    found.add(
                        Level::Refused,
                        about,
                        format!("{setting}: {shown} is open to others (mode {mode:o}); chmod 600"),
                    );
                }
                (Use::Written, _) => {
                    let parent = std::path::absolute(&path).ok().and_then(|path| path.parent().map(Path::to_path_buf));
                    if let Some(parent) = parent.filter(|parent| !parent.is_dir()) {
                        found.add(
                            Level::Refused,
                            about,
                            format!("{setting}: {shown} cannot be written: there is no folder {}", parent.display()),
                        );
                    }
                }
                (Use::Read | Use::Secret | Use::Folder, _) => {}
            }
        }
    }
}

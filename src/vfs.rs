//! The read-only tree of models and the files that are open: a filesystem without a kernel.
//!
//! In: verified models. Out: nodes by number, names, attributes, directory listings, open files.
//! Promises: a version's own tree never changes, so a listing of it is the same at every step; only the folder of a model's
//! versions does, when one comes, becomes `current` or leaves; a node number means one thing for the life of the mount and
//! is never given again; a version leaves only while nobody can reach it; modes have no write bit.
//! Not here: bytes (`read`), which memory a file is read from (`cache`), kernel types (`fuse`), when a version comes or
//! leaves (`models`).
//! Held by: the tests below, tests/e2e, tests/versions_view.rs.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use crate::cache::{Cache, CachedObject, Model, ObjectKey};
use crate::error::{Code, Error, Result};
use crate::read::{self, OpenFile};

/// A node's number: what `stat` shows as the inode. The root is 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u64);

pub const ROOT: NodeId = NodeId(1);

/// The link beside a model's versions that leads to the chosen one.
pub const CURRENT: &str = "current";

/// Who owns the tree and what they may do: local policy, never the manifest's.
#[derive(Debug, Clone, Copy)]
pub struct Ownership {
    pub uid: u32,
    pub gid: u32,
    /// Permission bits taken away from 0444, 0555 and directories' 0555.
    pub umask: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Directory,
    File,
    Link,
}

/// What `stat` says of a node.
#[derive(Debug, Clone, Copy)]
pub struct Attributes {
    pub node: NodeId,
    pub kind: Kind,
    /// Plain bytes; of a link the length of what it says; 0 for directories.
    pub size: u64,
    /// Permission bits.
    pub mode: u16,
    /// Seconds since 1970; may be negative.
    pub mtime: i64,
    pub links: u32,
}

/// How the versions of a model lie in the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// `NAME/FILE`: one version a model, for the life of the mount.
    Plain,
    /// `NAME/SEQ/FILE`, and `NAME/current`, a link to one `SEQ`.
    Versions,
}

/// A version as it is shown.
#[derive(Clone)]
pub struct Shown {
    pub model: Arc<Model>,
    /// What the model's name means now. Always so in the plain layout.
    pub current: bool,
}

/// A directory of names: above the models, or that of a model's versions.
struct Folder {
    parent: NodeId,
    children: Vec<Child>,
    mtime: i64,
    /// Its children come and go.
    versions: bool,
}

enum Node {
    Directory {
        parent: NodeId,
        children: Vec<Child>,
        mtime: i64,
    },
    File {
        parent: NodeId,
        file: u32,
    },
    /// To the version's own directory, beside it: whichever version is current, its own link is what `current` names. So
    /// what a link says never changes, and a walk that already holds one ends where it was going.
    Link,
}

struct Child {
    name: Box<[u8]>,
    node: NodeId,
}

/// One version: its nodes have consecutive numbers, the first is its directory.
struct Branch {
    first: u64,
    model: Arc<Model>,
    /// The folder that it hangs in.
    parent: NodeId,
    nodes: Vec<Node>,
    by_object: HashMap<u32, NodeId>,
    /// What the kernel was told of it and did not forget.
    lookups: AtomicU64,
    /// Open files and directories.
    handles: AtomicU64,
    last_used: Mutex<Instant>,
}

impl Branch {
    fn root(&self) -> NodeId {
        NodeId(self.first)
    }

    fn link(&self) -> NodeId {
        NodeId(self.first + 1)
    }

    fn used(&self) {
        *self.last_used.lock().expect("a thread died holding a time") = Instant::now();
    }

    fn idle_for(&self) -> Duration {
        self.last_used.lock().expect("a thread died holding a time").elapsed()
    }
}

/// Any node, borrowed.
enum At<'a> {
    Folder(&'a Folder),
    In(&'a Branch, &'a Node),
}

struct Tree {
    /// Numbers 1, 2, ...: made once, before every version.
    folders: Vec<Folder>,
    /// By number; those that left are not among them.
    branches: Vec<Arc<Branch>>,
    by_serial: HashMap<u32, Arc<Branch>>,
    /// Serials of the versions that `current` names.
    current: BTreeSet<u32>,
}

/// The tree of one mount.
pub struct Vfs {
    layout: Layout,
    tree: RwLock<Tree>,
    /// The next number. Held while a version is planted, so that readers wait for its insertion alone.
    next: Mutex<u64>,
    ownership: Ownership,
    cache: Cache,
    open: Mutex<HashMap<NodeId, Opened>>,
}

struct Opened {
    file: Arc<OpenFile>,
    handles: u64,
}

impl Vfs {
    /// The tree `MODEL NAME/FILE PATH` of `models`. A model's name may hold slashes; no name may lie inside another model.
    ///
    /// # Errors
    /// `USAGE` if two models have one name or one lies inside another.
    pub fn new(models: Vec<Arc<Model>>, ownership: Ownership, cache: Cache) -> Result<Self> {
        let shown = models.into_iter().map(|model| Shown { model, current: true }).collect();
        Vfs::with_layout(Layout::Plain, shown, ownership, cache)
    }

    /// The same in any layout. With [`Layout::Versions`] a name may come with several versions, one of them current.
    ///
    /// # Errors
    /// `USAGE` if two models have one place or one lies inside another.
    pub fn with_layout(layout: Layout, models: Vec<Shown>, ownership: Ownership, cache: Cache) -> Result<Self> {
        let names: BTreeSet<&str> = models.iter().map(|shown| shown.model.name.as_str()).collect();
        for name in &names {
            // Only prefixes that end at a slash can be an outer model: a look-up each, not every pair of names.
            let outer = name.match_indices('/').map(|(at, _)| &name[..at]).find(|prefix| names.contains(prefix));
            if let Some(outer) = outer {
                return Err(Error::new(
                    Code::Usage,
                    format!("model {name} lies inside model {outer}; mount one of them elsewhere"),
                ));
            }
        }
        let mut folders = vec![Folder { parent: ROOT, children: Vec::new(), mtime: 0, versions: false }];
        for shown in &models {
            make_folders(&mut folders, layout, &shown.model);
        }
        let next = folders.len() as u64 + 1;
        let tree = Tree { folders, branches: Vec::new(), by_serial: HashMap::new(), current: BTreeSet::new() };
        let vfs = Vfs {
            layout,
            tree: RwLock::new(tree),
            next: Mutex::new(next),
            ownership,
            cache,
            open: Mutex::new(HashMap::new()),
        };
        for shown in models {
            vfs.add(&shown.model)?;
            if layout == Layout::Plain || shown.current {
                vfs.set_current(shown.model.serial);
            }
        }
        Ok(vfs)
    }

    fn tree(&self) -> RwLockReadGuard<'_, Tree> {
        self.tree.read().expect("a thread died holding the tree")
    }

    fn tree_mut(&self) -> RwLockWriteGuard<'_, Tree> {
        self.tree.write().expect("a thread died holding the tree")
    }

    /// Shows one more version of a model whose name the tree was made with.
    ///
    /// # Errors
    /// `USAGE` if its place is taken, or the name is none of the tree's.
    pub fn add(&self, model: &Arc<Model>) -> Result<()> {
        let mut next = self.next.lock().expect("a thread died planting a version");
        let seq = model.manifest.header().seq;
        let (above, own_name) = match (self.layout, model.name.rsplit_once('/')) {
            (Layout::Versions, _) => (model.name.as_str(), seq.to_string()),
            (Layout::Plain, Some((above, own))) => (above, own.to_owned()),
            (Layout::Plain, None) => ("", model.name.clone()),
        };
        let parent = {
            let tree = self.tree();
            let parent = above
                .split('/')
                .filter(|part| !part.is_empty())
                .try_fold(ROOT, |at, part| tree.lookup(at, part.as_bytes()));
            let Some(parent) = parent else {
                return Err(Error::new(Code::Usage, format!("{} is not a model of this mount", model.name)));
            };
            if tree.lookup(parent, own_name.as_bytes()).is_some() {
                return Err(Error::new(
                    Code::Usage,
                    format!("one model is named twice: {} version {seq}; name each model once", model.name),
                ));
            }
            parent
        };
        let branch = plant(model, parent, *next, self.layout == Layout::Versions);
        *next += branch.nodes.len() as u64;
        let mut tree = self.tree_mut();
        tree.add_name(parent, own_name.as_bytes(), branch.root());
        let branch = Arc::new(branch);
        assert!(tree.by_serial.insert(model.serial, branch.clone()).is_none(), "a serial is one version's");
        tree.branches.push(branch);
        Ok(())
    }

    /// Makes a version the one that its model's name means. Returns the folder whose `current` changed, if one did.
    pub fn set_current(&self, serial: u32) -> Option<NodeId> {
        let mut tree = self.tree_mut();
        let chosen = tree.branch_of(serial)?.clone();
        if tree.current.contains(&serial) {
            return None;
        }
        if self.layout == Layout::Plain {
            tree.current.insert(serial);
            return None;
        }
        let others: Vec<u32> = tree
            .branches
            .iter()
            .filter(|other| other.model.name == chosen.model.name)
            .map(|b| b.model.serial)
            .collect();
        for other in others {
            tree.current.remove(&other);
        }
        tree.current.insert(serial);
        tree.remove_name(chosen.parent, CURRENT.as_bytes());
        tree.add_name(chosen.parent, CURRENT.as_bytes(), chosen.link());
        Some(chosen.parent)
    }

    /// Whether a version is not current, has nothing open, and was not used for `idle`. Names that the kernel remembers do
    /// not count: it remembers them for as long as it likes.
    pub fn is_idle(&self, serial: u32, idle: Duration) -> bool {
        let tree = self.tree();
        let Some(branch) = tree.branch_of(serial) else { return false };
        !tree.current.contains(&serial) && branch.handles.load(Ordering::SeqCst) == 0 && branch.idle_for() >= idle
    }

    /// The folder and the name of a version's directory.
    pub fn place(&self, serial: u32) -> Option<(NodeId, String)> {
        let tree = self.tree();
        let branch = tree.branch_of(serial)?;
        Some((branch.parent, branch.model.manifest.header().seq.to_string()))
    }

    /// Whether the kernel still knows a node of a version.
    pub fn is_known(&self, serial: u32) -> bool {
        self.tree().branch_of(serial).is_some_and(|branch| branch.lookups.load(Ordering::SeqCst) > 0)
    }

    /// Takes a version out of the tree, if it is neither current nor open nor known to the kernel: nobody can reach its
    /// nodes then, and nobody will again. Decided and done in one step.
    pub fn retire(&self, serial: u32) -> Option<Arc<Model>> {
        let mut tree = self.tree_mut();
        let branch = tree.branch_of(serial)?.clone();
        let reachable = branch.lookups.load(Ordering::SeqCst) > 0 || branch.handles.load(Ordering::SeqCst) > 0;
        if tree.current.contains(&serial) || reachable {
            return None;
        }
        let name = branch.model.manifest.header().seq.to_string();
        tree.remove_name(branch.parent, name.as_bytes());
        tree.branches.retain(|other| other.first != branch.first);
        tree.by_serial.remove(&serial);
        Some(branch.model.clone())
    }

    /// Every version shown, in the order in which they came.
    pub fn models(&self) -> Vec<Arc<Model>> {
        self.tree().branches.iter().map(|branch| branch.model.clone()).collect()
    }

    /// The same, with which are current.
    pub fn shown(&self) -> Vec<Shown> {
        let tree = self.tree();
        let shown = |branch: &Arc<Branch>| Shown {
            model: branch.model.clone(),
            current: tree.current.contains(&branch.model.serial),
        };
        tree.branches.iter().map(shown).collect()
    }

    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    pub fn ownership(&self) -> Ownership {
        self.ownership
    }

    /// Nodes, and the plain bytes of all files: what `statfs` reports.
    pub fn totals(&self) -> (u64, u64) {
        let tree = self.tree();
        let files = tree.branches.iter().flat_map(|branch| branch.model.manifest.files());
        let bytes = files.map(|file| file.size).fold(0, u64::saturating_add);
        let nodes = tree.folders.len() + tree.branches.iter().map(|branch| branch.nodes.len()).sum::<usize>();
        (nodes as u64, bytes)
    }

    /// The same of the models that `sees` lets through.
    pub fn totals_of_some(&self, sees: &dyn Fn(&str) -> bool) -> (u64, u64) {
        let tree = self.tree();
        let seen = tree.branches.iter().filter(|branch| sees(&branch.model.name));
        seen.fold((1, 0), |(nodes, bytes), branch| {
            let size = branch.model.manifest.files().iter().fold(0, |sum: u64, file| sum.saturating_add(file.size));
            (nodes + branch.nodes.len() as u64, bytes.saturating_add(size))
        })
    }

    /// Whether somebody who sees the models that `sees` lets through sees this node: a folder is seen by what is below it,
    /// the root by everybody.
    pub fn is_seen(&self, id: NodeId, sees: &dyn Fn(&str) -> bool) -> bool {
        id == ROOT || self.tree().is_seen(id, sees)
    }

    /// Every name in the tree and the folder it is in; of versions only those that the kernel knows.
    pub fn names(&self) -> Vec<(NodeId, Box<[u8]>)> {
        let tree = self.tree();
        let mut names = Vec::new();
        let mut add = |at: NodeId, children: &[Child]| {
            names.extend(children.iter().map(|child| (at, child.name.clone())));
        };
        for (index, folder) in tree.folders.iter().enumerate() {
            add(NodeId(index as u64 + 1), &folder.children);
        }
        for branch in tree.branches.iter().filter(|branch| branch.lookups.load(Ordering::SeqCst) > 0) {
            for (index, node) in branch.nodes.iter().enumerate() {
                if let Node::Directory { children, .. } = node {
                    add(NodeId(branch.first + index as u64), children);
                }
            }
        }
        names
    }

    pub fn lookup(&self, parent: NodeId, name: &[u8]) -> Option<NodeId> {
        self.tree().lookup(parent, name)
    }

    /// The same for a kernel that will remember the node until [`Vfs::forget`].
    pub fn enter(&self, parent: NodeId, name: &[u8]) -> Option<NodeId> {
        let tree = self.tree();
        let node = tree.lookup(parent, name)?;
        // Counted under the lock: a version leaves either before this, or not.
        if let Some(branch) = tree.branch_at(node) {
            branch.lookups.fetch_add(1, Ordering::SeqCst);
            branch.used();
        }
        Some(node)
    }

    /// The kernel forgot a node that it was told of `times` times.
    pub fn forget(&self, id: NodeId, times: u64) {
        if let Some(branch) = self.tree().branch_at(id) {
            // Never below zero: a wrong count would keep a version for ever, or let it go too early.
            let _ = branch
                .lookups
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |known| Some(known.saturating_sub(times)));
        }
    }

    pub fn attributes(&self, id: NodeId) -> Option<Attributes> {
        self.attributes_told(id, true)
    }

    /// The same for askers who do not see everything: nothing of a folder tells how much more is in it, or how new.
    pub fn attributes_of_some(&self, id: NodeId) -> Option<Attributes> {
        self.attributes_told(id, false)
    }

    fn attributes_told(&self, id: NodeId, all: bool) -> Option<Attributes> {
        let keep = !self.ownership.umask;
        let tree = self.tree();
        let directory = |children: &[Child], mtime| Attributes {
            node: id,
            kind: Kind::Directory,
            size: 0,
            mode: 0o555 & keep,
            mtime,
            links: 2 + children.iter().filter(|child| tree.kind(child.node) == Kind::Directory).count() as u32,
        };
        Some(match tree.get(id)? {
            At::Folder(folder) if all => directory(&folder.children, folder.mtime),
            // One link: a directory that does not say how many it has in it.
            At::Folder(_) => Attributes { links: 1, ..directory(&[], 0) },
            At::In(_, Node::Directory { children, mtime, .. }) => directory(children, *mtime),
            At::In(branch, Node::File { file, .. }) => {
                let entry = &branch.model.manifest.files()[*file as usize];
                Attributes {
                    node: id,
                    kind: Kind::File,
                    size: entry.size,
                    mode: entry.mode & 0o555 & keep,
                    mtime: entry.mtime,
                    links: 1,
                }
            }
            At::In(branch, Node::Link) => {
                let header = branch.model.manifest.header();
                Attributes {
                    node: id,
                    kind: Kind::Link,
                    size: header.seq.to_string().len() as u64,
                    mode: 0o777,
                    mtime: header.created_at,
                    links: 1,
                }
            }
        })
    }

    /// Entry `position` of a directory (`.` and `..` first), with its node and kind; `None` at the end.
    pub fn entry(&self, directory: NodeId, position: u64) -> Option<(NodeId, Kind, Box<[u8]>)> {
        let tree = self.tree();
        let (parent, children) = tree.listing(directory)?;
        match position {
            0 => Some((directory, Kind::Directory, (*b".").into())),
            1 => Some((parent, Kind::Directory, (*b"..").into())),
            _ => {
                let child = children.get(usize::try_from(position - 2).ok()?)?;
                Some((child.node, tree.kind(child.node), child.name.clone()))
            }
        }
    }

    pub fn is_directory(&self, id: NodeId) -> bool {
        self.tree().listing(id).is_some()
    }

    /// Whether what a directory lists may change: it is the folder of a model's versions.
    pub fn changes(&self, id: NodeId) -> bool {
        matches!(self.tree().get(id), Some(At::Folder(folder)) if folder.versions)
    }

    /// What a link says: the name of a version, beside it.
    pub fn link_target(&self, id: NodeId) -> Option<String> {
        match self.tree().get(id)? {
            At::In(branch, Node::Link) => Some(branch.model.manifest.header().seq.to_string()),
            At::Folder(_) | At::In(..) => None,
        }
    }

    /// Which file of which model a node is, and its directory; `None` for all else.
    pub fn file(&self, id: NodeId) -> Option<(Arc<Model>, u32, NodeId)> {
        match self.tree().get(id)? {
            At::In(branch, Node::File { parent, file }) => Some((branch.model.clone(), *file, *parent)),
            At::Folder(_) | At::In(..) => None,
        }
    }

    /// The model that a node is of; `None` for the folders above models.
    pub fn model_of(&self, id: NodeId) -> Option<Arc<Model>> {
        match self.tree().get(id)? {
            At::In(branch, _) => Some(branch.model.clone()),
            At::Folder(_) => None,
        }
    }

    /// The path of a folder above models, or of a model's versions; `None` for the root and for nodes of models.
    pub fn folder_path(&self, id: NodeId) -> Option<String> {
        let tree = self.tree();
        let (mut at, mut parts) = (id, Vec::new());
        while at != ROOT {
            let At::Folder(folder) = tree.get(at)? else { return None };
            let (_, children) = tree.listing(folder.parent)?;
            let child = children.iter().find(|child| child.node == at)?;
            parts.push(String::from_utf8_lossy(&child.name).into_owned());
            at = folder.parent;
        }
        parts.reverse();
        (!parts.is_empty()).then(|| parts.join("/"))
    }

    /// The last component of a file's path.
    pub fn file_name(&self, id: NodeId) -> Option<String> {
        let (model, file, _) = self.file(id)?;
        let path = model.manifest.path(&model.manifest.files()[file as usize]);
        path.rsplit('/').next().map(str::to_owned)
    }

    /// The file whose memory is `key` and nothing else: its node, its directory and its name there.
    pub fn name_of_object(&self, key: ObjectKey) -> Option<(NodeId, NodeId, Box<[u8]>)> {
        let tree = self.tree();
        let node = *tree.branch_of(key.model)?.by_object.get(&key.object)?;
        let At::In(_, Node::File { parent, .. }) = tree.get(node)? else { unreachable!("only files are in by_object") };
        let (_, children) = tree.listing(*parent).expect("a parent is a directory");
        let child = children.iter().find(|child| child.node == node)?;
        Some((node, *parent, child.name.clone()))
    }

    /// The object whose memory is exactly this file, when readers may be given it.
    pub fn sole_object(&self, id: NodeId) -> Option<Arc<CachedObject>> {
        let (model, file, _) = self.file(id)?;
        if !read::is_sole(&model, file) {
            return None;
        }
        let extent = &model.manifest.extents(&model.manifest.files()[file as usize])[0];
        let object = self.cache.object(&model, extent.object, true);
        object.is_hot_capable().then_some(object)
    }

    /// The shared open file behind a node; one per file however often it is open.
    pub fn open(&self, id: NodeId) -> Option<Arc<OpenFile>> {
        let tree = self.tree();
        let At::In(branch, Node::File { file, .. }) = tree.get(id)? else { return None };
        branch.handles.fetch_add(1, Ordering::SeqCst);
        branch.used();
        let mut open = self.open.lock().expect("a thread died holding the open files");
        let opened = open
            .entry(id)
            .or_insert_with(|| Opened { file: Arc::new(OpenFile::new(&self.cache, &branch.model, *file)), handles: 0 });
        opened.handles += 1;
        Some(opened.file.clone())
    }

    /// Ends what one [`Vfs::open`] began. Returns whether it was the last.
    pub fn release(&self, id: NodeId) -> bool {
        let last = {
            let mut open = self.open.lock().expect("a thread died holding the open files");
            let opened = open.get_mut(&id).expect("a release follows its open");
            opened.handles -= 1;
            let last = opened.handles == 0;
            if last {
                open.remove(&id);
            }
            last
        };
        self.end_use(id);
        last
    }

    /// A directory, or a file past the daemon, was opened: its version stays until [`Vfs::end_use`].
    pub fn begin_use(&self, id: NodeId) {
        if let Some(branch) = self.tree().branch_at(id) {
            branch.handles.fetch_add(1, Ordering::SeqCst);
            branch.used();
        }
    }

    /// Ends what one [`Vfs::begin_use`] began.
    pub fn end_use(&self, id: NodeId) {
        if let Some(branch) = self.tree().branch_at(id) {
            branch.used();
            branch.handles.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Files open through the daemon now, by node.
    pub fn open_count(&self) -> usize {
        self.open.lock().expect("a thread died holding the open files").len()
    }
}

impl Tree {
    fn get(&self, id: NodeId) -> Option<At<'_>> {
        let index = id.0.checked_sub(1)?;
        if let Some(folder) = self.folders.get(usize::try_from(index).ok()?) {
            return Some(At::Folder(folder));
        }
        let branch = self.branch_at(id)?;
        Some(At::In(branch, &branch.nodes[(id.0 - branch.first) as usize]))
    }

    fn branch_at(&self, id: NodeId) -> Option<&Arc<Branch>> {
        let after = self.branches.partition_point(|branch| branch.first <= id.0);
        let branch = &self.branches[after.checked_sub(1)?];
        (id.0 < branch.first + branch.nodes.len() as u64).then_some(branch)
    }

    fn is_seen(&self, id: NodeId, sees: &dyn Fn(&str) -> bool) -> bool {
        match self.get(id) {
            Some(At::Folder(folder)) => folder.children.iter().any(|child| self.is_seen(child.node, sees)),
            Some(At::In(branch, _)) => sees(&branch.model.name),
            None => false,
        }
    }

    fn branch_of(&self, serial: u32) -> Option<&Arc<Branch>> {
        self.by_serial.get(&serial)
    }

    fn kind(&self, id: NodeId) -> Kind {
        match self.get(id) {
            Some(At::In(_, Node::File { .. })) => Kind::File,
            Some(At::In(_, Node::Link)) => Kind::Link,
            Some(At::Folder(_) | At::In(_, Node::Directory { .. })) | None => Kind::Directory,
        }
    }

    fn listing(&self, id: NodeId) -> Option<(NodeId, &[Child])> {
        match self.get(id)? {
            At::Folder(folder) => Some((folder.parent, &folder.children)),
            At::In(_, Node::Directory { parent, children, .. }) => Some((*parent, children)),
            At::In(..) => None,
        }
    }

    fn lookup(&self, parent: NodeId, name: &[u8]) -> Option<NodeId> {
        let (_, children) = self.listing(parent)?;
        let at = children.binary_search_by(|child| (*child.name).cmp(name)).ok()?;
        Some(children[at].node)
    }

    fn add_name(&mut self, folder: NodeId, name: &[u8], node: NodeId) {
        let children = &mut self.folders[folder.0 as usize - 1].children;
        let at = children.partition_point(|child| *child.name < *name);
        children.insert(at, Child { name: name.into(), node });
    }

    fn remove_name(&mut self, folder: NodeId, name: &[u8]) {
        self.folders[folder.0 as usize - 1].children.retain(|child| *child.name != *name);
    }
}

/// The folders above a model, and with versions its own.
fn make_folders(folders: &mut Vec<Folder>, layout: Layout, model: &Model) {
    let parts: Vec<&str> = model.name.split('/').collect();
    let depth = if layout == Layout::Versions { parts.len() } else { parts.len() - 1 };
    let mut at = ROOT;
    for (level, part) in parts[..depth].iter().enumerate() {
        let children = &folders[at.0 as usize - 1].children;
        let place = children.binary_search_by(|child| (*child.name).cmp(part.as_bytes()));
        at = match place {
            Ok(found) => children[found].node,
            Err(place) => {
                let versions = level + 1 == parts.len();
                let mtime = model.manifest.header().created_at;
                folders.push(Folder { parent: at, children: Vec::new(), mtime, versions });
                let node = NodeId(folders.len() as u64);
                folders[at.0 as usize - 1].children.insert(place, Child { name: part.as_bytes().into(), node });
                node
            }
        };
    }
}

/// The nodes of one version, numbered from `first`. Its paths are sorted, so the directory of a path is always the last one
/// opened at its depth.
fn plant(model: &Arc<Model>, parent: NodeId, first: u64, with_link: bool) -> Branch {
    let created_at = model.manifest.header().created_at;
    let mut nodes = vec![Node::Directory { parent, children: Vec::new(), mtime: created_at }];
    if with_link {
        nodes.push(Node::Link);
    }
    let mut by_object = HashMap::new();
    let push = |nodes: &mut Vec<Node>, parent: NodeId, name: &str, node: Node| {
        nodes.push(node);
        let node = NodeId(first + nodes.len() as u64 - 1);
        let Node::Directory { children, .. } = &mut nodes[(parent.0 - first) as usize] else {
            unreachable!("a parent is a directory")
        };
        children.push(Child { name: name.as_bytes().into(), node });
        node
    };
    let root = NodeId(first);
    // The chain of directories that the previous path went through.
    let mut chain: Vec<(String, NodeId)> = Vec::new();
    for (index, entry) in model.manifest.files().iter().enumerate() {
        let path = model.manifest.path(entry);
        let (folders, name) = match path.rsplit_once('/') {
            Some((folders, name)) => (folders.split('/').collect(), name),
            None => (Vec::new(), path),
        };
        let common = chain.iter().zip(&folders).take_while(|((have, _), want)| have == *want).count();
        chain.truncate(common);
        for folder in &folders[common..] {
            let parent = chain.last().map_or(root, |(_, node)| *node);
            let made = Node::Directory { parent, children: Vec::new(), mtime: created_at };
            let node = push(&mut nodes, parent, folder, made);
            chain.push(((*folder).to_owned(), node));
        }
        let parent = chain.last().map_or(root, |(_, node)| *node);
        let node = push(&mut nodes, parent, name, Node::File { parent, file: index as u32 });
        if read::is_sole(model, index as u32) {
            by_object.insert(model.manifest.extents(entry)[0].object, node);
        }
    }
    for node in &mut nodes {
        if let Node::Directory { children, .. } = node {
            children.sort_by(|a, b| a.name.cmp(&b.name));
        }
    }
    Branch {
        first,
        model: model.clone(),
        parent,
        nodes,
        by_object,
        lookups: AtomicU64::new(0),
        handles: AtomicU64::new(0),
        last_used: Mutex::new(Instant::now()),
    }
}

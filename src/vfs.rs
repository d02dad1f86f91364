//! The read-only tree of models and the files that are open: a filesystem without a kernel.
//!
//! In: verified models. Out: nodes by number, names, attributes, directory listings, open files.
//! Promises: the tree never changes after it is built, so a listing is the same at every step of it; a node number means
//! one thing for the life of the mount; modes have no write bit.
//! Not here: bytes (`read`), which memory a file is read from (`cache`), kernel types (`fuse`).
//! Held by: the tests below, tests/e2e.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};

use crate::cache::{Cache, CachedObject, Model, ObjectKey};
use crate::error::{Code, Error, Result};
use crate::read::{self, OpenFile};

/// A node's number: what `stat` shows as the inode. The root is 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u64);

pub const ROOT: NodeId = NodeId(1);

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
}

/// What `stat` says of a node.
#[derive(Debug, Clone, Copy)]
pub struct Attributes {
    pub node: NodeId,
    pub kind: Kind,
    /// Plain bytes; 0 for directories.
    pub size: u64,
    /// Permission bits.
    pub mode: u16,
    /// Seconds since 1970; may be negative.
    pub mtime: i64,
    pub links: u32,
}

enum Node {
    Directory { parent: NodeId, children: Vec<Child>, mtime: i64 },
    File { parent: NodeId, model: u32, file: u32 },
}

struct Child {
    name: Box<[u8]>,
    node: NodeId,
}

/// The tree of one mount.
pub struct Vfs {
    models: Vec<Arc<Model>>,
    nodes: Vec<Node>,
    by_object: HashMap<ObjectKey, NodeId>,
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
        let mut vfs = Vfs {
            models,
            nodes: vec![Node::Directory { parent: ROOT, children: Vec::new(), mtime: 0 }],
            by_object: HashMap::new(),
            ownership,
            cache,
            open: Mutex::new(HashMap::new()),
        };
        let names: BTreeMap<&str, usize> = vfs.models.iter().enumerate().map(|(i, m)| (m.name.as_str(), i)).collect();
        if names.len() != vfs.models.len() {
            return Err(Error::new(Code::Usage, "one model is named twice; name each model once"));
        }
        for name in names.keys() {
            let inside = names.keys().find(|other| name.starts_with(&format!("{other}/")));
            if let Some(outer) = inside {
                return Err(Error::new(
                    Code::Usage,
                    format!("model {name} lies inside model {outer}; mount one of them elsewhere"),
                ));
            }
        }
        let models = vfs.models.clone();
        for model in &models {
            vfs.plant(model);
        }
        for node in &mut vfs.nodes {
            if let Node::Directory { children, .. } = node {
                children.sort_by(|a, b| a.name.cmp(&b.name));
            }
        }
        Ok(vfs)
    }

    /// Adds one model. Its paths are sorted, so the directory of a path is always the last one opened at its depth.
    fn plant(&mut self, model: &Arc<Model>) {
        let created_at = model.manifest.header().created_at;
        let mut base = ROOT;
        for part in model.name.split('/') {
            base = self.directory_in(base, part, created_at);
        }
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
                let parent = chain.last().map_or(base, |(_, node)| *node);
                let node = self.push(Node::Directory { parent, children: Vec::new(), mtime: created_at });
                self.add_child(parent, folder, node);
                chain.push(((*folder).to_owned(), node));
            }
            let parent = chain.last().map_or(base, |(_, node)| *node);
            let node = self.push(Node::File { parent, model: model.serial, file: index as u32 });
            self.add_child(parent, name, node);
            if read::is_sole(model, index as u32) {
                let extent = &model.manifest.extents(entry)[0];
                self.by_object.insert(ObjectKey { model: model.serial, object: extent.object }, node);
            }
        }
    }

    fn directory_in(&mut self, parent: NodeId, name: &str, mtime: i64) -> NodeId {
        let Node::Directory { children, .. } = self.node(parent) else { unreachable!("a parent is a directory") };
        // Only a model's own name walks through here: a handful of parts, children not yet sorted.
        if let Some(child) = children.iter().find(|child| *child.name == *name.as_bytes()) {
            return child.node;
        }
        let node = self.push(Node::Directory { parent, children: Vec::new(), mtime });
        self.add_child(parent, name, node);
        node
    }

    fn push(&mut self, node: Node) -> NodeId {
        self.nodes.push(node);
        NodeId(self.nodes.len() as u64)
    }

    fn add_child(&mut self, parent: NodeId, name: &str, node: NodeId) {
        let Node::Directory { children, .. } = &mut self.nodes[parent.0 as usize - 1] else {
            unreachable!("a parent is a directory")
        };
        children.push(Child { name: name.as_bytes().into(), node });
    }

    fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0 as usize - 1]
    }

    fn get(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(usize::try_from(id.0.checked_sub(1)?).ok()?)
    }

    pub fn models(&self) -> &[Arc<Model>] {
        &self.models
    }

    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    pub fn ownership(&self) -> Ownership {
        self.ownership
    }

    /// Nodes, and the plain bytes of all files: what `statfs` reports.
    pub fn totals(&self) -> (u64, u64) {
        let bytes = self.models.iter().flat_map(|m| m.manifest.files()).map(|f| f.size).fold(0, u64::saturating_add);
        (self.nodes.len() as u64, bytes)
    }

    pub fn lookup(&self, parent: NodeId, name: &[u8]) -> Option<NodeId> {
        let Some(Node::Directory { children, .. }) = self.get(parent) else { return None };
        let at = children.binary_search_by(|child| (*child.name).cmp(name)).ok()?;
        Some(children[at].node)
    }

    pub fn attributes(&self, id: NodeId) -> Option<Attributes> {
        let keep = !self.ownership.umask;
        Some(match self.get(id)? {
            Node::Directory { children, mtime, .. } => {
                let folders = children.iter().filter(|child| matches!(self.node(child.node), Node::Directory { .. }));
                Attributes {
                    node: id,
                    kind: Kind::Directory,
                    size: 0,
                    mode: 0o555 & keep,
                    mtime: *mtime,
                    links: 2 + folders.count() as u32,
                }
            }
            Node::File { model, file, .. } => {
                let entry = &self.models[*model as usize].manifest.files()[*file as usize];
                Attributes {
                    node: id,
                    kind: Kind::File,
                    size: entry.size,
                    mode: entry.mode & 0o555 & keep,
                    mtime: entry.mtime,
                    links: 1,
                }
            }
        })
    }

    /// Entry `position` of a directory (`.` and `..` first), with its node and kind; `None` at the end.
    pub fn entry(&self, directory: NodeId, position: u64) -> Option<(NodeId, Kind, &[u8])> {
        let Node::Directory { parent, children, .. } = self.get(directory)? else { return None };
        match position {
            0 => Some((directory, Kind::Directory, b".")),
            1 => Some((*parent, Kind::Directory, b"..")),
            _ => {
                let child = children.get(usize::try_from(position - 2).ok()?)?;
                let kind = match self.node(child.node) {
                    Node::Directory { .. } => Kind::Directory,
                    Node::File { .. } => Kind::File,
                };
                Some((child.node, kind, &child.name))
            }
        }
    }

    pub fn is_directory(&self, id: NodeId) -> bool {
        matches!(self.get(id), Some(Node::Directory { .. }))
    }

    /// Which file of which model a node is, and its directory; `None` for directories.
    pub fn file(&self, id: NodeId) -> Option<(&Arc<Model>, u32, NodeId)> {
        let Some(Node::File { parent, model, file }) = self.get(id) else { return None };
        Some((&self.models[*model as usize], *file, *parent))
    }

    /// The last component of a file's path.
    pub fn file_name(&self, id: NodeId) -> Option<&str> {
        let (model, file, _) = self.file(id)?;
        let path = model.manifest.path(&model.manifest.files()[file as usize]);
        path.rsplit('/').next()
    }

    /// The file whose memory is `key` and nothing else: its node, its directory and its name there.
    pub fn name_of_object(&self, key: ObjectKey) -> Option<(NodeId, NodeId, &[u8])> {
        let node = *self.by_object.get(&key)?;
        let Node::File { parent, .. } = self.node(node) else { unreachable!("only files are in by_object") };
        let Node::Directory { children, .. } = self.node(*parent) else { unreachable!("a parent is a directory") };
        let child = children.iter().find(|child| child.node == node)?;
        Some((node, *parent, &child.name))
    }

    /// The object whose memory is exactly this file, when readers may be given it.
    pub fn sole_object(&self, id: NodeId) -> Option<Arc<CachedObject>> {
        let Some(Node::File { model, file, .. }) = self.get(id) else { return None };
        let model = &self.models[*model as usize];
        if !read::is_sole(model, *file) {
            return None;
        }
        let extent = &model.manifest.extents(&model.manifest.files()[*file as usize])[0];
        let object = self.cache.object(model, extent.object, true);
        object.is_hot_capable().then_some(object)
    }

    /// The shared open file behind a node; one per file however often it is open.
    pub fn open(&self, id: NodeId) -> Option<Arc<OpenFile>> {
        let Some(Node::File { model, file, .. }) = self.get(id) else { return None };
        let mut open = self.open.lock().expect("a thread died holding the open files");
        let opened = open.entry(id).or_insert_with(|| Opened {
            file: Arc::new(OpenFile::new(&self.cache, &self.models[*model as usize], *file)),
            handles: 0,
        });
        opened.handles += 1;
        Some(opened.file.clone())
    }

    /// Ends what one [`Vfs::open`] began. Returns whether it was the last.
    pub fn release(&self, id: NodeId) -> bool {
        let mut open = self.open.lock().expect("a thread died holding the open files");
        let opened = open.get_mut(&id).expect("a release follows its open");
        opened.handles -= 1;
        let last = opened.handles == 0;
        if last {
            open.remove(&id);
        }
        last
    }

    /// Files open through the daemon now, by node.
    pub fn open_count(&self) -> usize {
        self.open.lock().expect("a thread died holding the open files").len()
    }
}

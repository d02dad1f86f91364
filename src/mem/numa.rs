//! How many banks of memory this machine has, and where the cache goes among them.
//!
//! In: /sys/devices/system/node below a root that tests replace. Out: the numbers of the nodes that have memory.
//! Why: pages come from the node of the thread that touches them first, here any opener. A model whose pages happen to
//! lie on one node is read at the speed of the link between nodes by every process on the other. The readers of a model
//! are many (one a GPU, on all nodes), so its pages are spread evenly: the arena's tmpfs is mounted with
//! `mpol=interleave`, which also spreads them whichever thread fills.
//! Held by: the tests below; on a machine with more nodes than one it has not been measured.

use std::path::Path;

/// Numbers of the nodes that have memory, in order. Empty where the kernel does not say: one node then.
pub fn memory_nodes(root: &Path) -> Vec<u32> {
    let nodes = root.join("sys/devices/system/node");
    let text = ["has_memory", "has_normal_memory", "online"]
        .into_iter()
        .find_map(|file| std::fs::read_to_string(nodes.join(file)).ok())
        .unwrap_or_default();
    parse_list(text.trim()).unwrap_or_default()
}

/// The kernel's list format: `0-1,4`.
fn parse_list(text: &str) -> Option<Vec<u32>> {
    /// More nodes than any machine has: what comes from a file must not decide how much is allocated.
    const NODES_MAX: u32 = 1024;
    let mut numbers = Vec::new();
    for part in text.split(',').filter(|part| !part.is_empty()) {
        let (low, high) = part.split_once('-').unwrap_or((part, part));
        let (low, high): (u32, u32) = (low.trim().parse().ok()?, high.trim().parse().ok()?);
        if low > high || high >= NODES_MAX {
            return None;
        }
        numbers.extend(low..=high);
    }
    Some(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes_of(files: &[(&str, &str)]) -> Vec<u32> {
        let root = tempfile::tempdir().expect("a temporary folder");
        let nodes = root.path().join("sys/devices/system/node");
        std::fs::create_dir_all(&nodes).expect("mkdir");
        for (file, text) in files {
            std::fs::write(nodes.join(file), text).expect("write");
        }
        memory_nodes(root.path())
    }

    #[test]
    fn nodes_with_memory_are_read_in_the_kernels_list_format() {
        assert_eq!(nodes_of(&[("has_memory", "0\n")]), [0]);
        assert_eq!(nodes_of(&[("has_memory", "0-1,4\n"), ("online", "0-7\n")]), [0, 1, 4]);
        assert_eq!(nodes_of(&[("online", "0-1\n")]), [0, 1]);
        assert_eq!(nodes_of(&[]), [] as [u32; 0]);
    }

    #[test]
    fn nonsense_counts_as_a_machine_of_one_node() {
        for text in ["x", "1-0", "0-4000000000", "0--3", "\n"] {
            assert_eq!(nodes_of(&[("has_memory", text)]), [] as [u32; 0], "{text:?}");
        }
    }

    #[test]
    fn this_machine_has_a_node() {
        let nodes = memory_nodes(Path::new("/"));
        assert!(nodes.is_empty() || nodes[0] < 64, "{nodes:?}");
    }
}

//! Every metric there is: its name, its labels, what it counts and how long the name holds.
//!
//! In: nothing. Out: [`METRICS`], what `metrics` fills in and docs/METRICS.md shows.
//! Promises: a `Stable` name, its labels and its meaning change only with a major version; what is not in this table is not
//! told. Names are in base units, counters end in `_total`.
//! Held by: the tests below and those of `metrics`.

/// How a metric moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Only grows, from the start of the process.
    Counter,
    /// As it is now.
    Gauge,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stability {
    Stable,
    /// May change with any version.
    Experimental,
}

#[derive(Debug)]
pub struct Metric {
    pub name: &'static str,
    pub shape: Shape,
    pub labels: &'static [&'static str],
    pub stability: Stability,
    pub help: &'static str,
}

impl Metric {
    pub fn find(name: &str) -> Option<&'static Metric> {
        METRICS.iter().find(|metric| metric.name == name)
    }

    /// In the name's end.
    pub fn unit(&self) -> &'static str {
        let stem = self.name.strip_suffix("_total").unwrap_or(self.name);
        ["bytes", "seconds", "ratio"].into_iter().find(|unit| stem.ends_with(unit)).unwrap_or("-")
    }
}

const fn counter(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Metric {
    Metric { name, shape: Shape::Counter, labels, stability: Stability::Stable, help }
}

const fn gauge(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Metric {
    Metric { name, shape: Shape::Gauge, labels, stability: Stability::Stable, help }
}

const fn experimental(metric: Metric) -> Metric {
    Metric { stability: Stability::Experimental, ..metric }
}

const NONE: &[&str] = &[];
const MODEL: &[&str] = &["model", "version"];
const MOUNT: &[&str] = &["mountpoint"];

/// In the order in which a scrape and the page show them.
pub const METRICS: &[Metric] = &[
    // The process.
    gauge("modelfs_build_info", &["version"], "1; which version of modelfs this is."),
    gauge("modelfs_start_time_seconds", NONE, "When the process started, as a Unix time."),
    gauge(
        "modelfs_ready",
        NONE,
        "1 if /ready answers 200: every mount serves, and there is one, or the process waits for volumes.",
    ),
    counter("modelfs_process_cpu_seconds_total", &["mode"], "CPU time of the process, user and system."),
    gauge("modelfs_process_resident_memory_bytes", NONE, "Memory of the process in RAM."),
    gauge("modelfs_process_locked_memory_bytes", NONE, "Memory of the process that the kernel counts as locked."),
    gauge("modelfs_process_threads", NONE, "Threads of the process."),
    gauge("modelfs_process_open_fds", NONE, "Open file descriptors of the process."),
    gauge("modelfs_process_max_fds", NONE, "How many file descriptors the process may have open."),
    gauge(
        "modelfs_disk_free_bytes",
        &["folder"],
        "Bytes that the process may still write to the file system of a folder: state, audit.",
    ),
    gauge("modelfs_disk_size_bytes", &["folder"], "Size of the file system of a folder: state, audit."),
    // The store.
    counter("modelfs_fetch_bytes_total", NONE, "Ciphertext bytes received from stores."),
    counter("modelfs_fetch_requests_total", NONE, "Chunks asked for at stores, retries not counted."),
    counter("modelfs_fetch_errors_total", NONE, "Of those, how many ended in an error after all retries."),
    counter("modelfs_fetch_seconds_total", NONE, "Time that chunks were waited for, summed over all of them."),
    counter("modelfs_fetch_refetches_total", NONE, "Chunks asked for again because hash or length was wrong."),
    counter("modelfs_hedges_sent_total", NONE, "Second requests for ranges whose first one was far behind its peers."),
    counter("modelfs_hedges_won_total", NONE, "Of those, how many answered before the first one."),
    counter("modelfs_origin_waits_total", NONE, "Calls that waited for their turn at the limits of a store."),
    counter("modelfs_origin_wait_seconds_total", NONE, "Time they waited, summed."),
    gauge("modelfs_store_up", &["store"], "0 if the last fetch from the store got no answer after all retries."),
    counter(
        "modelfs_storage_credentials_total",
        &["result"],
        "Sets of storage credentials: issued, renewed, failed (could not be had), refused (by the store).",
    ),
    gauge(
        "modelfs_storage_credentials_expiry_timestamp_seconds",
        MOUNT,
        "When the storage credentials of a mount end, as a Unix time.",
    ),
    // Verifying and opening.
    counter("modelfs_decrypted_chunks_total", NONE, "Chunks verified and decrypted."),
    counter("modelfs_decrypted_bytes_total", NONE, "Plaintext bytes made by that."),
    counter("modelfs_decrypt_seconds_total", NONE, "Time spent hashing and decrypting, summed over threads."),
    counter(
        "modelfs_tampered_chunks_total",
        &["reason"],
        "Chunks that were not what was signed: hash, tag (of a block), length.",
    ),
    // The cache.
    counter("modelfs_cache_hits_total", NONE, "Reads answered from locked memory at once."),
    counter("modelfs_cache_misses_total", NONE, "Reads that had to wait for a chunk."),
    gauge("modelfs_cache_bytes", NONE, "Plaintext in locked memory."),
    gauge("modelfs_cache_limit_bytes", NONE, "The most there may be."),
    gauge("modelfs_cache_peak_bytes", NONE, "The most there was."),
    counter("modelfs_cache_evicted_bytes_total", NONE, "Plaintext given up to make room."),
    counter("modelfs_wiped_bytes_total", NONE, "Plaintext overwritten with zeros: evictions, locks, ends of mounts."),
    counter(
        "modelfs_unwiped_bytes_total",
        NONE,
        "Plaintext cut off from readers and given back without being overwritten.",
    ),
    counter("modelfs_wipe_seconds_total", NONE, "Time spent overwriting, summed over threads."),
    gauge("modelfs_huge_page_short_bytes", NONE, "Bytes that should lie in huge pages and got small ones."),
    counter("modelfs_prefetched_bytes_total", NONE, "Plaintext fetched ahead of reads."),
    counter("modelfs_prefetch_used_bytes_total", NONE, "Of that, how much a read asked for later."),
    counter("modelfs_fills_foreseen_total", NONE, "Files whose rest was fetched because of how they were read."),
    // Readers.
    counter(
        "modelfs_opens_total",
        &["mode"],
        "Opens: plain (through the daemon), passthrough (the locked pages themselves).",
    ),
    counter("modelfs_opens_held_total", NONE, "Opens that were held until the file was whole."),
    counter("modelfs_opens_held_in_vain_total", NONE, "Of those, opens answered before it was, for want of time."),
    counter("modelfs_reads_total", NONE, "Reads that reached the daemon."),
    counter("modelfs_read_bytes_total", NONE, "Bytes that the daemon answered them with."),
    counter("modelfs_read_errors_total", NONE, "Reads answered with an error."),
    counter("modelfs_read_deadlines_total", NONE, "Waits that ended at their deadline."),
    counter("modelfs_estale_answers_total", NONE, "Opens answered ESTALE so that the kernel looks the name up again."),
    counter("modelfs_passthrough_refused_total", NONE, "Passthrough that the kernel refused; the open went on plain."),
    // Models. At most 1000 versions are named, the rest is summed under the model `(others)`.
    gauge("modelfs_models", NONE, "Versions of models that are shown."),
    gauge("modelfs_model_bytes", MODEL, "Size of a version's files."),
    gauge("modelfs_model_resident_bytes", MODEL, "How much of it is in locked memory."),
    gauge("modelfs_model_current", MODEL, "1 if the model's name means this version."),
    gauge("modelfs_model_locked", MODEL, "1 if the version is locked."),
    gauge(
        "modelfs_model_load_seconds",
        MODEL,
        "The last load of a version: from the first chunk asked for to the last that came, without a pause of 10 s between.",
    ),
    gauge("modelfs_model_load_bytes", MODEL, "Plaintext that came in it."),
    gauge(
        "modelfs_model_ref_expiry_timestamp_seconds",
        MODEL,
        "When the signed ref that leads to the version ends, as a Unix time; absent if it does not.",
    ),
    // Mounts.
    gauge("modelfs_mounts", NONE, "Mounts of this process."),
    gauge("modelfs_mount_up", MOUNT, "1 if the mount is in the tree and answers."),
    gauge("modelfs_mount_ready", MOUNT, "1 if it serves what it must: see /ready."),
    gauge("modelfs_mount_refused", MOUNT, "1 if it refuses its readers."),
    gauge("modelfs_mount_open_handles", MOUNT, "Files that programs have open through the daemon."),
    gauge("modelfs_mount_start_time_seconds", MOUNT, "When it was mounted, as a Unix time."),
    gauge("modelfs_vault_up", MOUNT, "0 if Vault is away, sealed, or does not take our token any more."),
    gauge("modelfs_vault_state", &["mountpoint", "state"], "1 for the state: idle, live, away, sealed, lost."),
    gauge("modelfs_vault_token_expiry_timestamp_seconds", MOUNT, "When our Vault token ends, as a Unix time."),
    // Who may, who did, who is told.
    counter(
        "modelfs_events_total",
        &["kind", "severity", "outcome"],
        "What happened that somebody answers for, as the audit log names it; each open only where http, audit or alerts are on.",
    ),
    counter("modelfs_access_denied_total", NONE, "Opens and look-ups that a rule refused."),
    counter("modelfs_limited_total", NONE, "Requests that reached a limit of opens or bytes of somebody."),
    gauge("modelfs_blocked", NONE, "Users and cgroups that are refused everything for a while."),
    gauge("modelfs_audit_mode", &["mode"], "1 for the mode of the audit log: off, on, required."),
    counter("modelfs_audit_records_total", NONE, "Records of the audit log written."),
    counter("modelfs_audit_failures_total", NONE, "Records of the audit log that could not be written."),
    gauge(
        "modelfs_audit_waiting_records",
        NONE,
        "Records of the audit log since its last checkpoint, which nothing signed vouches for yet.",
    ),
    gauge(
        "modelfs_audit_checkpoint_age_seconds",
        NONE,
        "How long the oldest checkpoint has been on its way to the disk and elsewhere; 0 if none is.",
    ),
    counter(
        "modelfs_alerts_total",
        &["result"],
        "Alerts, for each webhook: sent, failed (after all attempts), merged (told with another), dropped (no room to wait).",
    ),
    counter("modelfs_http_requests_total", &["result"], "Requests for metrics and health: answered, refused."),
    counter("modelfs_control_requests_total", &["result"], "Requests at the control socket: answered, refused."),
    // GPUs, where there are any.
    experimental(gauge("modelfs_gpu_memory_size_bytes", &["gpu", "name"], "Memory of a GPU.")),
    experimental(gauge("modelfs_gpu_memory_used_bytes", &["gpu", "name"], "Of that, how much is in use.")),
    experimental(gauge("modelfs_gpu_utilisation_ratio", &["gpu", "name"], "Share of time in which a GPU was at work.")),
];

/// The table of docs/METRICS.md.
pub fn page() -> String {
    let mut out = String::from("| name | type | unit | labels | holds | meaning |\n|---|---|---|---|---|---|\n");
    for metric in METRICS {
        let shape = match metric.shape {
            Shape::Counter => "counter",
            Shape::Gauge => "gauge",
        };
        let stability = match metric.stability {
            Stability::Stable => "stable",
            Stability::Experimental => "experimental",
        };
        let labels = if metric.labels.is_empty() { "-".to_owned() } else { metric.labels.join(", ") };
        let (name, unit, help) = (metric.name, metric.unit(), metric.help);
        out.push_str(&format!("| `{name}` | {shape} | {unit} | {labels} | {stability} | {help} |\n"));
    }
    out
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_are_unique_prefixed_and_end_as_their_shape_says() {
        let mut seen = HashSet::new();
        for metric in METRICS {
            let name = metric.name;
            assert!(seen.insert(name), "{name} is there twice");
            assert!(name.starts_with("modelfs_"), "{name}");
            assert_eq!(name.ends_with("_total"), metric.shape == Shape::Counter, "{name}");
            assert!(metric.help.ends_with('.') && !metric.help.contains('|'), "{name}: {}", metric.help);
            let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
            assert!(name.chars().all(plain) && metric.labels.iter().all(|label| label.chars().all(plain)), "{name}");
        }
    }

    #[test]
    fn the_page_shows_the_table_as_it_is() {
        let page_text = include_str!("../../docs/METRICS.md");
        let (begin, end) = ("<!-- metrics: begin -->\n", "<!-- metrics: end -->");
        let shown = page_text.split_once(begin).and_then(|(_, rest)| rest.split_once(end)).map(|(table, _)| table);
        let wanted = page();
        assert!(
            shown == Some(wanted.as_str()),
            "docs/METRICS.md must hold this between `metrics: begin` and `metrics: end`:\n{wanted}"
        );
    }
}

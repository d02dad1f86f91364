//! One scrape: every number of the process in Prometheus' text format.
//!
//! In: the counters of [`Telemetry`](crate::telemetry::Telemetry), read once; the host, its mounts and models, the kernel. Out: text.
//! Promises: every family is in the table (`table`) and has the labels it has there; the number of series is bounded,
//! whatever is mounted; no value is a secret; no read of a model waits for a scrape.
//! Not here: who may ask (`server`).
//! Held by: the tests below, tests/observe.rs.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, SystemTime};

use prometheus::proto::{Counter, Gauge, LabelPair, Metric as Sample, MetricFamily, MetricType};
use prometheus::{Encoder, TextEncoder};

use super::facts::{self, Facts};
use super::table::{METRICS, Metric, Shape};
use crate::gpu::{self, Gpu};
use crate::telemetry::Snapshot;
use crate::vault::VaultState;

/// Versions told one by one; those with the most in memory.
pub const MODELS_MAX: usize = 1000;

/// Mounts told one by one.
pub const MOUNTS_MAX: usize = 1000;

/// What stands for the models beyond.
const OTHERS: &str = "(others)";

/// What [`text`] is, as HTTP says it.
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// A scrape as it is filled in, in the order of the table.
#[derive(Default)]
struct Scrape(BTreeMap<usize, Vec<Sample>>);

impl Scrape {
    /// `labels` in the order of the table.
    fn put(&mut self, name: &str, labels: &[&str], value: f64) {
        let at =
            METRICS.iter().position(|metric| metric.name == name).expect("every name that is told is in the table");
        let metric = &METRICS[at];
        assert_eq!(metric.labels.len(), labels.len(), "{name} has the labels of the table");
        let pair = |(name, value): (&&str, &&str)| {
            let mut pair = LabelPair::default();
            pair.set_name((*name).to_owned());
            pair.set_value((*value).to_owned());
            pair
        };
        let mut sample = Sample::default();
        sample.set_label(metric.labels.iter().zip(labels).map(pair).collect());
        match metric.shape {
            Shape::Counter => {
                let mut counter = Counter::default();
                counter.set_value(value);
                sample.set_counter(counter);
            }
            Shape::Gauge => {
                let mut gauge = Gauge::default();
                gauge.set_value(value);
                sample.set_gauge(gauge);
            }
        }
        self.0.entry(at).or_default().push(sample);
    }

    fn whole(&mut self, name: &str, labels: &[&str], value: u64) {
        self.put(name, labels, value as f64);
    }

    fn is(&mut self, name: &str, labels: &[&str], value: bool) {
        self.put(name, labels, f64::from(u8::from(value)));
    }

    fn text(self) -> String {
        let mut out = Vec::new();
        TextEncoder::new().encode(&self.families(), &mut out).expect("families with samples are written to memory");
        String::from_utf8(out).expect("labels are text, and the rest is ours")
    }

    fn families(self) -> Vec<MetricFamily> {
        let family = |(at, samples): (usize, Vec<Sample>)| {
            let metric: &Metric = &METRICS[at];
            let mut family = MetricFamily::default();
            family.set_name(metric.name.to_owned());
            family.set_help(metric.help.to_owned());
            family.set_field_type(match metric.shape {
                Shape::Counter => MetricType::COUNTER,
                Shape::Gauge => MetricType::GAUGE,
            });
            family.set_metric(samples);
            family
        };
        self.0.into_iter().map(family).collect()
    }
}

/// Everything, as it is now. Blocking, as long as the kernel takes to tell of the process.
pub fn text(facts: &Facts) -> String {
    let mut scrape = Scrape::default();
    process(&mut scrape, facts);
    numbers(&mut scrape, &facts.numbers);
    for (kind, severity, outcome, count) in &facts.events {
        let labels = [named(kind), named(severity), named(outcome)];
        scrape.whole("modelfs_events_total", &labels.each_ref().map(String::as_str), *count);
    }
    gpus(&mut scrape, &gpu::devices());
    models(&mut scrape, facts);
    mounts(&mut scrape, facts);
    scrape.text()
}

/// The name that serde gives a unit variant.
fn named(value: &impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|name| name.as_str().map(str::to_owned)).unwrap_or_default()
}

fn unix(at: SystemTime) -> f64 {
    at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

fn after(left: Duration) -> f64 {
    // Whole seconds: a moment that does not move must not seem to.
    unix(SystemTime::now() + left).round()
}

fn process(scrape: &mut Scrape, facts: &Facts) {
    scrape.whole("modelfs_build_info", &[env!("CARGO_PKG_VERSION")], 1);
    scrape.put("modelfs_start_time_seconds", &[], unix(facts.started));
    scrape.is("modelfs_ready", &[], facts.is_ready());
    for mode in ["off", "on", "required"] {
        scrape.is("modelfs_audit_mode", &[mode], facts.audit == mode);
    }
    let own = facts::Process::now();
    scrape.put("modelfs_process_cpu_seconds_total", &["user"], own.cpu_user.as_secs_f64());
    scrape.put("modelfs_process_cpu_seconds_total", &["system"], own.cpu_system.as_secs_f64());
    for (name, value) in [
        ("modelfs_process_resident_memory_bytes", own.resident_bytes),
        ("modelfs_process_locked_memory_bytes", own.locked_bytes),
        ("modelfs_process_threads", own.threads),
        ("modelfs_process_open_fds", own.open_fds),
        ("modelfs_process_max_fds", own.max_fds),
    ] {
        if let Some(value) = value {
            scrape.whole(name, &[], value);
        }
    }
    for (folder, path) in &facts.folders {
        if let Some(disk) = facts::Disk::of(Path::new(path)) {
            scrape.whole("modelfs_disk_free_bytes", &[folder], disk.free_bytes);
            scrape.whole("modelfs_disk_size_bytes", &[folder], disk.size_bytes);
        }
    }
}

/// Every field of a snapshot under its name in the table: a new one does not compile until it has one.
fn numbers(scrape: &mut Scrape, numbers: &Snapshot) {
    scrape.whole("modelfs_audit_checkpoint_age_seconds", &[], numbers.audit_checkpoint_age());
    let Snapshot {
        fetch_bytes,
        fetch_requests,
        fetch_errors,
        refetches,
        hedges_sent,
        hedges_won,
        fetch_seconds,
        limit_waits,
        limit_wait_seconds,
        credentials_issued,
        credentials_renewed,
        credentials_failed,
        credentials_refused,
        chunks_opened,
        opened_bytes,
        open_seconds,
        hash_failures,
        tag_failures,
        length_failures,
        cache_hits,
        cache_misses,
        cache_bytes,
        cache_bytes_max,
        evicted_bytes,
        wiped_bytes,
        unwiped_bytes,
        wipe_seconds,
        huge_page_short_bytes,
        prefetch_fetched_bytes,
        prefetch_used_bytes,
        reads,
        read_bytes,
        read_errors,
        opens_plain,
        opens_passthrough,
        opens_held,
        opens_held_in_vain,
        fills_foreseen,
        estale_answers,
        passthrough_refused,
        deadline_errors,
        access_denied,
        limited,
        blocked,
        audit_records,
        audit_failures,
        audit_waiting,
        audit_pending_since: _,
        alerts_sent,
        alerts_failed,
        alerts_merged,
        alerts_dropped,
        http_requests,
        http_refused,
        control_requests,
        control_refused,
    } = numbers;
    for (name, value) in [
        ("modelfs_fetch_bytes_total", fetch_bytes),
        ("modelfs_fetch_requests_total", fetch_requests),
        ("modelfs_fetch_errors_total", fetch_errors),
        ("modelfs_fetch_refetches_total", refetches),
        ("modelfs_hedges_sent_total", hedges_sent),
        ("modelfs_hedges_won_total", hedges_won),
        ("modelfs_origin_waits_total", limit_waits),
        ("modelfs_decrypted_chunks_total", chunks_opened),
        ("modelfs_decrypted_bytes_total", opened_bytes),
        ("modelfs_cache_hits_total", cache_hits),
        ("modelfs_cache_misses_total", cache_misses),
        ("modelfs_cache_bytes", cache_bytes),
        ("modelfs_cache_limit_bytes", cache_bytes_max),
        ("modelfs_cache_evicted_bytes_total", evicted_bytes),
        ("modelfs_wiped_bytes_total", wiped_bytes),
        ("modelfs_unwiped_bytes_total", unwiped_bytes),
        ("modelfs_huge_page_short_bytes", huge_page_short_bytes),
        ("modelfs_prefetched_bytes_total", prefetch_fetched_bytes),
        ("modelfs_prefetch_used_bytes_total", prefetch_used_bytes),
        ("modelfs_fills_foreseen_total", fills_foreseen),
        ("modelfs_opens_held_total", opens_held),
        ("modelfs_opens_held_in_vain_total", opens_held_in_vain),
        ("modelfs_reads_total", reads),
        ("modelfs_read_bytes_total", read_bytes),
        ("modelfs_read_errors_total", read_errors),
        ("modelfs_read_deadlines_total", deadline_errors),
        ("modelfs_estale_answers_total", estale_answers),
        ("modelfs_passthrough_refused_total", passthrough_refused),
        ("modelfs_access_denied_total", access_denied),
        ("modelfs_limited_total", limited),
        ("modelfs_blocked", blocked),
        ("modelfs_audit_records_total", audit_records),
        ("modelfs_audit_failures_total", audit_failures),
        ("modelfs_audit_waiting_records", audit_waiting),
    ] {
        scrape.whole(name, &[], *value);
    }
    for (name, label, value) in [
        ("modelfs_storage_credentials_total", "issued", credentials_issued),
        ("modelfs_storage_credentials_total", "renewed", credentials_renewed),
        ("modelfs_storage_credentials_total", "failed", credentials_failed),
        ("modelfs_storage_credentials_total", "refused", credentials_refused),
        ("modelfs_tampered_chunks_total", "hash", hash_failures),
        ("modelfs_tampered_chunks_total", "tag", tag_failures),
        ("modelfs_tampered_chunks_total", "length", length_failures),
        ("modelfs_opens_total", "plain", opens_plain),
        ("modelfs_opens_total", "passthrough", opens_passthrough),
        ("modelfs_alerts_total", "sent", alerts_sent),
        ("modelfs_alerts_total", "failed", alerts_failed),
        ("modelfs_alerts_total", "merged", alerts_merged),
        ("modelfs_alerts_total", "dropped", alerts_dropped),
        ("modelfs_http_requests_total", "answered", http_requests),
        ("modelfs_http_requests_total", "refused", http_refused),
        ("modelfs_control_requests_total", "answered", control_requests),
        ("modelfs_control_requests_total", "refused", control_refused),
    ] {
        scrape.whole(name, &[label], *value);
    }
    for (name, value) in [
        ("modelfs_fetch_seconds_total", fetch_seconds),
        ("modelfs_origin_wait_seconds_total", limit_wait_seconds),
        ("modelfs_decrypt_seconds_total", open_seconds),
        ("modelfs_wipe_seconds_total", wipe_seconds),
    ] {
        scrape.put(name, &[], *value);
    }
}

fn gpus(scrape: &mut Scrape, gpus: &[Gpu]) {
    for gpu in gpus {
        let number = gpu.index.to_string();
        let labels = [number.as_str(), gpu.name.as_str()];
        for (name, value) in
            [("modelfs_gpu_memory_size_bytes", gpu.memory_total), ("modelfs_gpu_memory_used_bytes", gpu.memory_used)]
        {
            if let Some(value) = value {
                scrape.whole(name, &labels, value);
            }
        }
        if let Some(percent) = gpu.utilisation_percent {
            scrape.put("modelfs_gpu_utilisation_ratio", &labels, f64::from(percent) / 100.0);
        }
    }
}

fn models(scrape: &mut Scrape, facts: &Facts) {
    scrape.whole("modelfs_cache_peak_bytes", &[], facts.cache_peak_bytes);
    scrape.whole("modelfs_models", &[], facts.models.len() as u64);
    let mut models: Vec<&facts::ModelFacts> = facts.models.iter().collect();
    models.sort_by_key(|model| std::cmp::Reverse(model.resident_bytes));
    let others = models.split_off(models.len().min(MODELS_MAX));
    for model in models {
        let version = model.version.to_string();
        let labels = [model.name.as_str(), version.as_str()];
        scrape.whole("modelfs_model_bytes", &labels, model.bytes);
        scrape.whole("modelfs_model_resident_bytes", &labels, model.resident_bytes);
        scrape.is("modelfs_model_current", &labels, model.current);
        scrape.is("modelfs_model_locked", &labels, model.locked);
        if let Some(load) = model.load {
            scrape.put("modelfs_model_load_seconds", &labels, load.took.as_secs_f64());
            scrape.whole("modelfs_model_load_bytes", &labels, load.bytes);
        }
        if let Some(at) = model.expires_at {
            scrape.put("modelfs_model_ref_expiry_timestamp_seconds", &labels, at as f64);
        }
    }
    if !others.is_empty() {
        let labels = [OTHERS, ""];
        scrape.whole("modelfs_model_bytes", &labels, others.iter().map(|model| model.bytes).sum());
        scrape.whole("modelfs_model_resident_bytes", &labels, others.iter().map(|model| model.resident_bytes).sum());
        scrape.is("modelfs_model_locked", &labels, others.iter().any(|model| model.locked));
    }
}

fn mounts(scrape: &mut Scrape, facts: &Facts) {
    scrape.whole("modelfs_mounts", &[], facts.mounts.len() as u64);
    for (store, silent) in facts.stores().into_iter().take(MOUNTS_MAX) {
        scrape.is("modelfs_store_up", &[store], !silent);
    }
    for mount in facts.mounts.iter().take(MOUNTS_MAX) {
        let label = mount.mountpoint.to_string_lossy();
        let labels = [&*label];
        scrape.is("modelfs_mount_up", &labels, mount.answers);
        scrape.is("modelfs_mount_ready", &labels, mount.trouble().is_none());
        scrape.is("modelfs_mount_refused", &labels, mount.refused);
        scrape.whole("modelfs_mount_open_handles", &labels, mount.open_handles);
        scrape.put("modelfs_mount_start_time_seconds", &labels, unix(mount.since));
        if let Some(vault) = &mount.vault {
            let up = matches!(vault, VaultState::Idle | VaultState::Live { .. });
            scrape.is("modelfs_vault_up", &labels, up);
            for state in ["idle", "live", "away", "sealed", "lost"] {
                scrape.is("modelfs_vault_state", &[&label, state], vault.name() == state);
            }
            if let VaultState::Live { expires: Some(at) } = vault {
                let left = at.saturating_duration_since(std::time::Instant::now());
                scrape.put("modelfs_vault_token_expiry_timestamp_seconds", &labels, after(left));
            }
        }
        if let Some(left) = mount.credentials_end_in {
            scrape.put("modelfs_storage_credentials_expiry_timestamp_seconds", &labels, after(left));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::facts::{ModelFacts, MountFacts};
    use super::*;
    use crate::telemetry::Telemetry;
    use crate::telemetry::events::{Event, Kind, Outcome};

    fn model(name: &str, version: u64, resident_bytes: u64) -> ModelFacts {
        ModelFacts {
            name: name.into(),
            version,
            bytes: 1000,
            resident_bytes,
            current: true,
            locked: false,
            load: None,
            expires_at: None,
        }
    }

    #[test]
    fn a_scrape_tells_what_was_counted_under_the_names_of_the_table() {
        let telemetry = Telemetry::default();
        telemetry.fetch_bytes.add(4096);
        telemetry.tag_failures.inc();
        telemetry.wipe_seconds.add(Duration::from_millis(1500));
        telemetry.events.tell(&Event::new(Kind::LeaseLost).outcome(Outcome::Failed));
        let mut facts = Facts::empty(&telemetry);
        facts.models.push(model("acme/llama \"8b\"", 3, 500));
        facts.mounts.push(MountFacts::still("/mnt/a\nb".into()));
        let text = text(&facts);
        for line in [
            "# TYPE modelfs_fetch_bytes_total counter",
            "modelfs_fetch_bytes_total 4096",
            "modelfs_tampered_chunks_total{reason=\"tag\"} 1",
            "modelfs_wipe_seconds_total 1.5",
            "modelfs_events_total{kind=\"lease-lost\",severity=\"high\",outcome=\"failed\"} 1",
            "modelfs_model_resident_bytes{model=\"acme/llama \\\"8b\\\"\",version=\"3\"} 500",
            "modelfs_mount_up{mountpoint=\"/mnt/a\\nb\"} 1",
        ] {
            assert!(text.lines().any(|seen| seen == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn a_gpu_is_told_as_its_driver_tells_it() {
        let mut scrape = Scrape::default();
        let gpu = |index, memory_used, utilisation_percent| Gpu {
            index,
            uuid: "GPU-aa".into(),
            name: "H200".into(),
            memory_total: Some(1 << 37),
            memory_used,
            utilisation_percent,
        };
        gpus(&mut scrape, &[gpu(0, Some(4096), Some(37)), gpu(1, None, None)]);
        let text = scrape.text();
        for line in [
            "modelfs_gpu_memory_size_bytes{gpu=\"0\",name=\"H200\"} 137438953472",
            "modelfs_gpu_memory_used_bytes{gpu=\"0\",name=\"H200\"} 4096",
            "modelfs_gpu_utilisation_ratio{gpu=\"0\",name=\"H200\"} 0.37",
            "modelfs_gpu_memory_size_bytes{gpu=\"1\",name=\"H200\"} 137438953472",
        ] {
            assert!(text.lines().any(|seen| seen == line), "{line} is not in\n{text}");
        }
        assert_eq!(text.lines().filter(|line| line.contains("gpu=\"1\"")).count(), 1, "nothing is made up: {text}");
    }

    #[test]
    fn the_number_of_series_is_bounded_and_what_is_not_named_is_summed() {
        let telemetry = Telemetry::default();
        let mut facts = Facts::empty(&telemetry);
        for version in 0..(MODELS_MAX as u64 + 7) {
            facts.models.push(model("m", version, 10));
        }
        facts.models.push(model("loaded", 1, 1 << 30));
        let text = text(&facts);
        let named = text.lines().filter(|line| line.starts_with("modelfs_model_resident_bytes{")).count();
        assert_eq!(named, MODELS_MAX + 1);
        assert!(text.contains("modelfs_model_resident_bytes{model=\"(others)\",version=\"\"} 80"), "{text}");
        assert!(text.contains("{model=\"loaded\",version=\"1\"} 1073741824"));
        assert!(text.contains(&format!("modelfs_models {}", MODELS_MAX + 8)));
    }
}

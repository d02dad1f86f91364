//! Somebody is told: a line of the log and a POST of JSON to each webhook, for what is bad enough.
//!
//! In: events. Out: one alert for each, or one for many of the same within [`MERGE_WINDOW`], with how many there were.
//! Promises: whoever emits an event never waits; what waits to be sent is bounded, and what finds no room is counted; a
//! webhook that does not answer holds up neither the others nor the end of the process for longer than [`END_GRACE`]; an
//! address of a webhook is a secret, and is in no log, metric or status; it is https, or this very machine.
//! Not here: what is bad (who emits says so), the record of it (`audit`).
//! Held by: the tests below, tests/observe.rs.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use tokio::sync::mpsc::{self, Receiver, Sender};
use tokio::time::Instant;
use url::Url;
use zeroize::Zeroizing;

use crate::config::oversight::AlertPlan;
use crate::error::{Code, Error, Result};
use crate::mem::{self, LockedBuf};
use crate::refuse;
use crate::telemetry::events::{Event, Kind, Severity, Sink};
use crate::telemetry::{Telemetry, scrub};
use crate::units::show_time;

/// What is told of by default: somebody should look today.
pub const FROM: Severity = Severity::High;
/// The same again within so long is counted, and told of once at the end of it.
pub const MERGE_WINDOW: Duration = Duration::from_secs(30);
/// Different things that are counted at once.
const KEYS_MAX: usize = 256;
/// Users and control groups blocked at once that have alerts of their own; those beyond are counted together.
const BLOCKS_MAX: usize = 32;
/// Events taken and not looked at yet.
const EVENTS_MAX: usize = 1024;
/// Alerts that wait for one webhook.
const WAITING_MAX: usize = 64;
const WEBHOOKS_MAX: usize = 16;
const FILE_BYTES_MAX: usize = 64 << 10;
/// How often a webhook is tried with one alert; pauses grow from the first to the longest.
const ATTEMPTS_MAX: u32 = 6;
const PAUSE_FIRST: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(16);
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection waits for the next alert.
const IDLE_CONNECTION: Duration = Duration::from_secs(1);
/// How long the end of the process waits for alerts to get out.
const END_GRACE: Duration = Duration::from_secs(3);

/// One place that is told. Its address is never shown: for most services it is all that is needed to write there.
struct Webhook {
    number: usize,
    address: LockedBuf,
}

impl Webhook {
    /// # Errors
    /// `USAGE` without the address.
    fn new(number: usize, text: &str) -> Result<Webhook> {
        let bad = |what: &str| Error::new(Code::Usage, format!("alert webhook {number} {what}"));
        let url = Url::parse(text).map_err(|_| bad("is no URL; write https://HOST/PATH"))?;
        let local = match url.host() {
            Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
            Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
            Some(url::Host::Domain(name)) => name == "localhost",
            None => return Err(bad("names no host; write https://HOST/PATH")),
        };
        match url.scheme() {
            "https" => {}
            "http" if local => {}
            "http" => return Err(bad("is plain http to another machine; write https")),
            _ => return Err(bad("is not https")),
        }
        Ok(Webhook { number, address: LockedBuf::copy_of(url.as_str().as_bytes())? })
    }

    /// For one request; the heap overwrites it when it is given back.
    fn url(&self) -> Url {
        let text = std::str::from_utf8(&self.address).expect("copied from text");
        Url::parse(text).expect("it was one")
    }
}

/// The sink. Closed by [`Alerts::close`], or when dropped.
pub struct Alerts {
    from: Severity,
    telemetry: Arc<Telemetry>,
    queue: Mutex<Option<Sender<Alert>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What happened, when, and how often by now.
#[derive(Clone)]
struct Alert {
    event: Event,
    first: SystemTime,
    last: SystemTime,
    count: u64,
}

impl Alerts {
    /// `None` if nobody asked for any.
    ///
    /// # Errors
    /// `USAGE` for an address that cannot be one, `KEY_PERMS` for a file of addresses that others can read.
    pub fn start(plan: &AlertPlan, telemetry: Arc<Telemetry>) -> Result<Option<Arc<Alerts>>> {
        Alerts::start_within(plan, telemetry, ATTEMPT_TIMEOUT, END_GRACE)
    }

    /// The same with other times than [`ATTEMPT_TIMEOUT`] and [`END_GRACE`].
    fn start_within(
        plan: &AlertPlan,
        telemetry: Arc<Telemetry>,
        attempt: Duration,
        end: Duration,
    ) -> Result<Option<Arc<Alerts>>> {
        if plan.webhooks.is_empty() && plan.webhook_file.is_none() && plan.from.is_none() {
            return Ok(None);
        }
        let webhooks = webhooks(plan)?;
        let client = reqwest::Client::builder()
            .user_agent(concat!("modelfs/", env!("CARGO_PKG_VERSION")))
            // A redirect could lead from https to anywhere.
            .redirect(reqwest::redirect::Policy::none())
            // The address that was asked lies in a connection's buffer as long as that waits for its next use.
            .pool_idle_timeout(IDLE_CONNECTION)
            .timeout(attempt)
            .build()
            .map_err(|e| {
                Error::new(Code::Host, "cannot make an HTTP client for alerts").with_source(e.without_url())
            })?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| Error::new(Code::Host, "cannot start a runtime for alerts").with_source(e))?;
        let (queue, events) = mpsc::channel(EVENTS_MAX);
        let thread = std::thread::Builder::new()
            .name("alerts".into())
            .spawn({
                let telemetry = telemetry.clone();
                move || {
                    runtime.block_on(work(events, webhooks, client, telemetry, end));
                    runtime.shutdown_timeout(Duration::ZERO);
                }
            })
            .map_err(|e| Error::new(Code::Host, "cannot start a thread for alerts").with_source(e))?;
        Ok(Some(Arc::new(Alerts {
            from: plan.from.unwrap_or(FROM),
            telemetry,
            queue: Mutex::new(Some(queue)),
            thread: Mutex::new(Some(thread)),
        })))
    }

    /// Sends what waits, for [`END_GRACE`] at most. What comes later is not sent.
    pub fn close(&self) {
        drop(self.queue.lock().expect("a thread died holding the alerts").take());
        if let Some(thread) = self.thread.lock().expect("a thread died holding the alerts").take() {
            drop(thread.join());
        }
    }
}

impl Drop for Alerts {
    fn drop(&mut self) {
        self.close();
    }
}

impl Sink for Alerts {
    fn take(&self, event: &Event) -> Result<()> {
        if event.severity < self.from || event.kind == Kind::Checkpoint {
            return Ok(());
        }
        let now = SystemTime::now();
        let alert = Alert { event: event.clone(), first: now, last: now, count: 1 };
        let queue = self.queue.lock().expect("a thread died holding the alerts");
        if queue.as_ref().is_none_or(|queue| queue.try_send(alert).is_err()) {
            self.telemetry.alerts_dropped.inc();
        }
        Ok(())
    }
}

fn webhooks(plan: &AlertPlan) -> Result<Vec<Webhook>> {
    let mut words: Vec<Zeroizing<String>> = plan.webhooks.iter().cloned().map(Zeroizing::new).collect();
    if let Some(path) = &plan.webhook_file {
        words.extend(addresses_in(path)?);
    }
    if words.len() > WEBHOOKS_MAX {
        refuse!(Usage, "{} alert webhooks; {WEBHOOKS_MAX} are enough", words.len());
    }
    words.iter().enumerate().map(|(at, text)| Webhook::new(at + 1, text)).collect()
}

fn addresses_in(path: &Path) -> Result<Vec<Zeroizing<String>>> {
    let bytes = mem::read_private_file(path, FILE_BYTES_MAX).map_err(|e| e.context("alert-webhook-file"))?;
    let text = std::str::from_utf8(&bytes)
        .map_err(|_| Error::new(Code::KeyFormat, format!("alert-webhook-file {} is no text", path.display())))?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let lines: Vec<Zeroizing<String>> = lines.map(|line| Zeroizing::new(line.to_owned())).collect();
    if lines.is_empty() {
        refuse!(KeyFormat, "alert-webhook-file {} names no webhook; write one https:// address a line", path.display());
    }
    Ok(lines)
}

/// By what two events are the same to whoever is told: not by who did it, since a flood may come from many. Whom a block is
/// about is what it is.
#[derive(PartialEq, Eq, Hash, Clone)]
struct Key {
    kind: Kind,
    severity: Severity,
    code: Option<Code>,
    place: [Option<String>; 3],
    blocked: Option<(Option<u32>, Option<String>)>,
}

impl Key {
    /// `apart`: there is room for an alert for each who is blocked.
    fn of(event: &Event, apart: bool) -> Key {
        let (subject, actor) = (&event.subject, &event.actor);
        let mountpoint = subject.mountpoint.as_ref().map(|path| path.display().to_string());
        // A user is counted apart in each container; a control group that is blocked comes without a user.
        let place_of = if actor.uid.is_some() { &actor.container } else { &actor.cgroup };
        Key {
            kind: event.kind,
            severity: event.severity,
            code: event.code,
            place: [subject.model.clone(), subject.store.clone(), mountpoint],
            blocked: (apart && is_of_a_block(event.kind)).then(|| (actor.uid, place_of.clone())),
        }
    }
}

const fn is_of_a_block(kind: Kind) -> bool {
    matches!(kind, Kind::Block | Kind::Unblock)
}

/// The window that an event falls into.
fn key_of(event: &Event, open: &HashMap<Key, Open>) -> Key {
    let key = Key::of(event, true);
    if key.blocked.is_none() || open.contains_key(&key) {
        return key;
    }
    let apart = open.keys().filter(|key| key.blocked.is_some()).count();
    // However many are blocked at once, there is room for what else happens.
    if apart < BLOCKS_MAX { key } else { Key::of(event, false) }
}

/// One kind of thing within its window.
struct Open {
    ends: Instant,
    /// What came since the last one that was told.
    more: Option<Alert>,
}

/// Merges, and hands on. Returns when everything is out after the queue is closed.
async fn work(
    mut events: Receiver<Alert>,
    webhooks: Vec<Webhook>,
    client: reqwest::Client,
    telemetry: Arc<Telemetry>,
    end: Duration,
) {
    let start = |webhook| {
        let (queue, alerts) = mpsc::channel(WAITING_MAX);
        (queue, tokio::spawn(send_all(webhook, alerts, client.clone(), telemetry.clone())))
    };
    let (senders, sending): (Vec<Sender<Arc<Value>>>, Vec<_>) = webhooks.into_iter().map(start).unzip();
    let tell = |alert: &Alert| tell(alert, &senders, &telemetry);
    let mut open: HashMap<Key, Open> = HashMap::new();
    loop {
        let next = open.values().map(|one| one.ends).min();
        let wait = async {
            match next {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            alert = events.recv() => {
                let Some(alert) = alert else { break };
                let (key, full) = (key_of(&alert.event, &open), open.len() >= KEYS_MAX);
                match open.get_mut(&key) {
                    Some(one) => {
                        telemetry.alerts_merged.inc();
                        one.more = Some(match one.more.take() {
                            Some(before) => Alert { first: before.first, count: before.count + 1, ..alert },
                            None => alert,
                        });
                    }
                    None if full => telemetry.alerts_dropped.inc(),
                    None => {
                        tell(&alert);
                        open.insert(key, Open { ends: Instant::now() + MERGE_WINDOW, more: None });
                    }
                }
            }
            () = wait => {
                let now = Instant::now();
                open.retain(|_, one| {
                    if one.ends > now {
                        return true;
                    }
                    // Another window for what goes on; an end for what does not.
                    let Some(more) = one.more.take() else { return false };
                    tell(&more);
                    one.ends = now + MERGE_WINDOW;
                    true
                });
            }
        }
    }
    for more in open.into_values().filter_map(|one| one.more) {
        tell(&more);
    }
    drop(senders);
    // What is not out by then is not waited for.
    let _ = tokio::time::timeout(end, futures::future::join_all(sending)).await;
}

fn tell(alert: &Alert, senders: &[Sender<Arc<Value>>], telemetry: &Telemetry) {
    log(alert);
    let payload = Arc::new(payload(alert));
    for sender in senders {
        if sender.try_send(payload.clone()).is_err() {
            telemetry.alerts_dropped.inc();
        }
    }
}

fn log(alert: &Alert) {
    let Alert { event, count, .. } = alert;
    let (kind, severity, text) = (word(&event.kind), word(&event.severity), summary(alert));
    match event.severity {
        Severity::Critical | Severity::High => tracing::error!(alert = kind, severity, count, "{text}"),
        Severity::Medium => tracing::warn!(alert = kind, severity, count, "{text}"),
        Severity::Low => tracing::info!(alert = kind, severity, count, "{text}"),
    }
}

/// The name that serde gives it.
fn word(value: &impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|name| name.as_str().map(str::to_owned)).unwrap_or_default()
}

/// In a sentence.
fn summary(alert: &Alert) -> String {
    let event = &alert.event;
    let mut text = format!("{} {}", word(&event.kind), word(&event.outcome));
    if let Some(model) = &event.subject.model {
        text.push_str(&format!(" of {model}"));
    }
    if alert.count > 1 {
        text.push_str(&format!(", {} times", alert.count));
    }
    if let Some(detail) = &event.detail {
        text.push_str(&format!(": {detail}"));
    }
    scrub(&text).into_owned()
}

/// What a webhook gets. The names of the fields are a contract: docs/METRICS.md tells them.
fn payload(alert: &Alert) -> Value {
    let event = &alert.event;
    let summary = summary(alert);
    json!({
        "schema": "modelfs.alert.v1",
        // What chat rooms show.
        "text": format!("modelfs on {}: {summary}", host_name()),
        "host": host_name(),
        "pid": std::process::id(),
        "kind": event.kind,
        "severity": event.severity,
        "outcome": event.outcome,
        "code": event.code.map(Code::name),
        "summary": summary,
        "count": alert.count,
        "first": moment(alert.first),
        "last": moment(alert.last),
        "actor": event.actor,
        "subject": event.subject,
        "detail": event.detail.as_deref().map(scrub),
    })
}

/// As RFC 3339 writes it.
fn moment(at: SystemTime) -> String {
    let seconds = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    show_time(i64::try_from(seconds).unwrap_or(i64::MAX)).replacen(' ', "T", 1)
}

fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
}

async fn send_all(
    webhook: Webhook,
    mut alerts: Receiver<Arc<Value>>,
    client: reqwest::Client,
    telemetry: Arc<Telemetry>,
) {
    while let Some(alert) = alerts.recv().await {
        match send(&webhook, &alert, &client).await {
            Ok(()) => telemetry.alerts_sent.inc(),
            Err(why) => {
                telemetry.alerts_failed.inc();
                tracing::warn!("alert webhook {} did not take an alert: {why}", webhook.number);
            }
        }
    }
}

async fn send(webhook: &Webhook, alert: &Value, client: &reqwest::Client) -> std::result::Result<(), String> {
    let body = alert.to_string();
    let mut pause = PAUSE_FIRST;
    let mut attempt = 1;
    loop {
        let asked = client
            .post(webhook.url())
            .header(reqwest::header::CONTENT_TYPE, "application/json")
            .body(body.clone())
            .send()
            .await;
        let why = match asked {
            Ok(answer) if answer.status().is_success() => return Ok(()),
            Ok(answer) => {
                let status = answer.status();
                // What it does not take now it does not take later, unless it says so.
                if !(status.is_server_error() || matches!(status.as_u16(), 408 | 425 | 429)) {
                    return Err(format!("it answers {status}"));
                }
                format!("it answers {status}")
            }
            // Chains of it may hold the address.
            Err(failed) if failed.is_timeout() => "it does not answer in time".to_owned(),
            Err(failed) if failed.is_connect() => "it cannot be reached".to_owned(),
            Err(_) => "the connection broke".to_owned(),
        };
        if attempt >= ATTEMPTS_MAX {
            return Err(format!("{why}, after {attempt} attempts"));
        }
        attempt += 1;
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::sync::mpsc as std_mpsc;

    use super::*;
    use crate::telemetry::events::{Actor, Outcome, Subject};

    /// Takes one request after the other and answers each with the next status, the last one for ever.
    fn receiver(statuses: &'static [u16]) -> (String, std_mpsc::Receiver<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let url = format!("http://{}/hook/s3cret-part", listener.local_addr().expect("an address"));
        let (tell, told) = std_mpsc::channel();
        std::thread::spawn(move || {
            let mut statuses = statuses.iter();
            let mut status = statuses.next().expect("one at least");
            for stream in listener.incoming() {
                let body = body_of(stream.expect("taken"), *status);
                if let Some(next) = statuses.next() {
                    status = next;
                }
                if tell.send(body).is_err() {
                    return;
                }
            }
        });
        (url, told)
    }

    fn body_of(mut stream: TcpStream, status: u16) -> String {
        let mut seen = Vec::new();
        let mut piece = [0u8; 4096];
        loop {
            let got = stream.read(&mut piece).expect("read");
            seen.extend_from_slice(&piece[..got]);
            let text = String::from_utf8_lossy(&seen);
            if let Some((head, body)) = text.split_once("\r\n\r\n") {
                let length = head.to_ascii_lowercase();
                let length = length.lines().find_map(|line| line.strip_prefix("content-length: ")).expect("a length");
                if body.len() >= length.parse::<usize>().expect("a number") {
                    let body = body.to_owned();
                    write!(stream, "HTTP/1.1 {status} x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                        .expect("told");
                    return body;
                }
            }
        }
    }

    fn tampered(model: &str) -> Event {
        Event::new(Kind::Tamper)
            .severity(Severity::Critical)
            .outcome(Outcome::Failed)
            .subject(Subject { model: Some(model.into()), ..Subject::default() })
            .detail("chunk 3 is not what was signed; token hvs.CAESIJabc")
    }

    /// A machine that is held up is no webhook that does not answer.
    const PATIENT: Duration = Duration::from_secs(120);

    fn alerts(url: &str, telemetry: &Arc<Telemetry>, end: Duration) -> Arc<Alerts> {
        let plan = AlertPlan { webhooks: vec![url.into()], ..AlertPlan::default() };
        Alerts::start_within(&plan, telemetry.clone(), PATIENT, end).expect("started").expect("asked for")
    }

    #[test]
    fn a_webhook_hears_of_what_is_bad_enough_once_and_of_a_flood_with_its_size() {
        let (url, told) = receiver(&[200]);
        let telemetry = Arc::new(Telemetry::default());
        let alerts = alerts(&url, &telemetry, PATIENT);
        alerts.take(&Event::new(Kind::Open)).expect("never refuses");
        for _ in 0..100 {
            alerts.take(&tampered("acme/llama")).expect("never refuses");
        }
        alerts.take(&tampered("acme/other")).expect("never refuses");
        let first: Value = serde_json::from_str(&told.recv_timeout(PATIENT).expect("told")).expect("JSON");
        assert_eq!(
            (&first["kind"], &first["severity"], &first["count"]),
            (&json!("tamper"), &json!("critical"), &json!(1))
        );
        assert_eq!(first["schema"], "modelfs.alert.v1");
        assert!(!first.to_string().contains("CAESIJ"), "{first}");
        let other: Value = serde_json::from_str(&told.recv_timeout(PATIENT).expect("told")).expect("JSON");
        assert_eq!(other["subject"]["model"], "acme/other");
        // The end does not wait for the window.
        alerts.close();
        let rest: Value = serde_json::from_str(&told.recv_timeout(PATIENT).expect("told")).expect("JSON");
        assert_eq!((&rest["count"], &rest["subject"]["model"]), (&json!(99), &json!("acme/llama")));
        assert!(rest["summary"].as_str().is_some_and(|text| text.contains("99 times")), "{rest}");
        assert_eq!((telemetry.alerts_sent.get(), telemetry.alerts_merged.get()), (3, 99));
        alerts.take(&tampered("late")).expect("never refuses");
        assert_eq!(telemetry.alerts_dropped.get(), 1, "after the end");
    }

    fn next(told: &std_mpsc::Receiver<String>) -> Value {
        serde_json::from_str(&told.recv_timeout(Duration::from_secs(60)).expect("told")).expect("JSON")
    }

    #[test]
    fn blocks_of_different_users_containers_and_control_groups_are_alerts_of_their_own() {
        let (url, told) = receiver(&[200]);
        let telemetry = Arc::new(Telemetry::default());
        let alerts = alerts(&url, &telemetry, PATIENT);
        let block = |actor: Actor| {
            let event = Event::new(Kind::Block).outcome(Outcome::Denied).actor(actor);
            alerts.take(&event.subject(Subject { model: Some("acme/llama".into()), ..Subject::default() }))
        };
        let user = |uid, container: Option<&str>| Actor {
            uid: Some(uid),
            pid: Some(7),
            container: container.map(str::to_owned),
            ..Actor::default()
        };
        let group = |path: &str| Actor { cgroup: Some(path.into()), ..Actor::default() };
        let different =
            [user(1000, None), user(1001, None), user(1000, Some("3f2a")), group("/a.service"), group("/b.service")];
        for actor in &different {
            block(actor.clone()).expect("never refuses");
        }
        for actor in &different {
            let alert = next(&told);
            assert_eq!((&alert["kind"], &alert["count"]), (&json!("block"), &json!(1)), "{alert}");
            assert_eq!(alert["actor"], serde_json::to_value(actor).expect("JSON"), "{alert}");
        }
        // The same user again, by another process of his: counted with the first.
        block(Actor { pid: Some(8), ..user(1000, None) }).expect("never refuses");
        // So many that they would leave no room: counted together, and what else happens is told.
        for uid in 2000..2000 + 2 * KEYS_MAX as u32 {
            block(user(uid, None)).expect("never refuses");
        }
        alerts.take(&tampered("acme/llama")).expect("never refuses");
        // Those that are apart, the first of those that are not, and the other thing.
        let at_once: Vec<Value> = (0..BLOCKS_MAX - different.len() + 2).map(|_| next(&told)).collect();
        assert_eq!(at_once.last().expect("some")["kind"], "tamper");
        alerts.close();
        let rest = [next(&told), next(&told)].map(|alert| alert["count"].as_u64().expect("a number"));
        let together = (2 * KEYS_MAX - (BLOCKS_MAX - different.len()) - 1) as u64;
        assert!(rest == [1, together] || rest == [together, 1], "{rest:?}, {together} together");
        assert_eq!(telemetry.alerts_dropped.get(), 0);
    }

    /// Each alarm as the program emits it: the severity is its kind's, in `Event::new`, or the error's.
    #[test]
    fn what_calls_somebody_by_default_is_just_what_the_pages_say() {
        let error = |code| Error::new(code, "x");
        let hostile = |code| Event::of_hostile(&error(code)).expect("an alarm");
        // The wanted answers are docs/METRICS.md's, "Alerts".
        let cases = [
            ("tamper", "critical", hostile(Code::ChunkHash)),
            ("rollback", "critical", hostile(Code::Rollback)),
            ("block", "high", Event::new(Kind::Block)),
            ("lease-lost", "high", Event::new(Kind::LeaseLost).error(&error(Code::VaultDenied))),
            ("store-down", "high", Event::new(Kind::StoreDown).error(&error(Code::Unreachable))),
            ("", "medium", Event::new(Kind::VaultDown).error(&error(Code::VaultUnreachable))),
            ("", "low", Event::new(Kind::Renewal)),
            ("", "low", Event::new(Kind::Unblock)),
            ("", "low", Event::new(Kind::Open)),
        ];
        let (url, told) = receiver(&[200]);
        let alerts = alerts(&url, &Arc::new(Telemetry::default()), PATIENT);
        for (_, severity, event) in &cases {
            assert_eq!(event.severity.name(), *severity, "{event:?}");
            alerts.take(event).expect("never refuses");
        }
        for (kind, severity, _) in cases.iter().filter(|(kind, ..)| !kind.is_empty()) {
            let alert = next(&told);
            assert_eq!((&alert["kind"], &alert["severity"]), (&json!(kind), &json!(severity)), "{alert}");
        }
        alerts.close();
        assert!(told.try_recv().is_err(), "nobody is called for the rest");
    }

    #[test]
    fn a_webhook_that_fails_is_tried_again_and_one_that_refuses_is_not() {
        let (url, told) = receiver(&[503, 200]);
        let telemetry = Arc::new(Telemetry::default());
        let shaky = alerts(&url, &telemetry, PATIENT);
        shaky.take(&tampered("m")).expect("never refuses");
        assert_eq!(told.recv_timeout(PATIENT).expect("told"), told.recv_timeout(PATIENT).expect("told again"));
        shaky.close();
        assert_eq!((telemetry.alerts_sent.get(), telemetry.alerts_failed.get()), (1, 0));
        let (url, told) = receiver(&[404]);
        let gone = alerts(&url, &telemetry, PATIENT);
        gone.take(&tampered("m")).expect("never refuses");
        told.recv_timeout(PATIENT).expect("told");
        gone.close();
        assert_eq!((telemetry.alerts_sent.get(), telemetry.alerts_failed.get()), (1, 1));
        assert!(told.try_recv().is_err(), "asked once");
    }

    #[test]
    fn what_nobody_takes_fills_no_memory_and_holds_nobody_up() {
        // Listens, and never answers.
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let url = format!("http://{}/", listener.local_addr().expect("an address"));
        let telemetry = Arc::new(Telemetry::default());
        let alerts = alerts(&url, &telemetry, END_GRACE);
        for model in 0..10_000 {
            alerts.take(&tampered(&format!("m{model}"))).expect("never refuses");
        }
        alerts.close();
        let (sent, dropped) = (telemetry.alerts_sent.get(), telemetry.alerts_dropped.get());
        assert!(sent == 0 && dropped > 10_000 - 2 * (KEYS_MAX + WAITING_MAX) as u64, "{dropped} dropped");
    }

    #[test]
    fn an_address_is_https_or_this_machine_and_an_error_does_not_show_it() {
        for good in ["https://hooks.example/T/s3cret", "http://127.0.0.1:9/x", "http://[::1]/x", "http://localhost/x"] {
            assert!(Webhook::new(1, good).is_ok(), "{good}");
        }
        for (bad, fix) in [
            ("http://hooks.example/s3cret", "write https"),
            ("ftp://hooks.example/s3cret", "not https"),
            ("hooks.example/s3cret", "no URL"),
            ("http://localhost.evil.example/s3cret", "write https"),
        ] {
            let error = Webhook::new(2, bad).err().expect(bad).chain();
            assert!(error.contains(fix) && !error.contains("s3cret"), "{error}");
        }
        assert_eq!(moment(SystemTime::UNIX_EPOCH), "1970-01-01T00:00:00Z");
    }
}

//! Times here are only ever waited for, never measured: a slow machine makes these tests slow, not red.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc;

use super::*;
use crate::telemetry::events::Sink;

/// Issues `AKn`, `secret-canary-n`, numbered from 1, and remembers what it was asked.
struct Issuer {
    numbers: AtomicU64,
    asked: mpsc::Sender<String>,
    ttl: Duration,
    temporary: bool,
    renewable: bool,
    /// What is said of every lease that is asked about; `None`: nothing, the issuer is away.
    revoked: Option<bool>,
    /// A revoked lease is a loss that lasts.
    stops: bool,
    /// Answers an error while above 0, and counts down.
    failures: AtomicUsize,
}

impl Issuer {
    fn start(make: impl FnOnce(&mut Issuer)) -> (LeasedCredentials, Arc<Telemetry>, mpsc::Receiver<String>) {
        let (asked, seen) = mpsc::channel();
        let (numbers, failures) = (AtomicU64::new(0), AtomicUsize::new(0));
        let ttl = Duration::from_secs(3600);
        let (temporary, renewable, revoked, stops) = (false, false, Some(false), false);
        let mut issuer = Issuer { numbers, asked, ttl, temporary, renewable, revoked, stops, failures };
        make(&mut issuer);
        let telemetry = Arc::new(Telemetry::default());
        let new = if issuer.stops { LeasedCredentials::lost_when_revoked } else { LeasedCredentials::new };
        (new(Box::new(issuer), telemetry.clone()), telemetry, seen)
    }
}

impl IssueCredentials for Issuer {
    fn issue(&self) -> Result<Issued> {
        let _ = self.asked.send("issue".into());
        if self.failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok() {
            return Err(Error::new(Code::VaultUnreachable, "vault does not answer"));
        }
        let number = self.numbers.fetch_add(1, Ordering::SeqCst) + 1;
        let locked = |text: String| LockedBuf::copy_of(text.as_bytes());
        Ok(Issued {
            key_id: locked(format!("AK{number}"))?,
            secret: locked(format!("secret-canary-{number}"))?,
            token: if self.temporary { Some(locked(format!("token-canary-{number}"))?) } else { None },
            ttl: Some(self.ttl),
            lease_id: Some(format!("lease-{number}")),
            renewable: self.renewable,
        })
    }
    fn renew(&self, lease_id: &str) -> Result<Duration> {
        let _ = self.asked.send(format!("renew {lease_id}"));
        match self.revoked {
            Some(true) => Err(Error::new(Code::VaultNotFound, "there is no such lease")),
            _ => Ok(Duration::from_millis(1)),
        }
    }
    fn revoke(&self, lease_id: &str) -> Result<()> {
        let _ = self.asked.send(format!("revoke {lease_id}"));
        Ok(())
    }
    fn was_revoked(&self, lease_id: &str) -> Result<bool> {
        let _ = self.asked.send(format!("look {lease_id}"));
        self.revoked.ok_or_else(|| Error::new(Code::VaultUnreachable, "vault does not answer"))
    }
    fn describe(&self) -> String {
        "vault-aws:aws/test".into()
    }
}

async fn key_id(credentials: &LeasedCredentials) -> String {
    credentials.get_credential().await.expect("credentials").key_id.clone()
}

#[tokio::test]
async fn nothing_is_asked_before_the_first_request_and_once_for_all_of_them() {
    let (credentials, telemetry, asked) = Issuer::start(|_| {});
    assert_eq!(credentials.status().state, "idle");
    assert!(asked.try_recv().is_err());
    let all = futures::future::join_all((0..50).map(|_| key_id(&credentials))).await;
    assert!(all.iter().all(|id| id == "AK1"), "{all:?}");
    assert_eq!((asked.try_iter().count(), telemetry.credentials_issued.get()), (1, 1));
    assert_eq!(credentials.status().state, "current");
}

#[tokio::test]
async fn they_are_replaced_before_they_end_while_the_old_ones_serve() {
    let (credentials, _, _) = Issuer::start(|issuer| issuer.ttl = Duration::from_millis(1500));
    let first = key_id(&credentials).await;
    // Unless we were held up for all of their time.
    assert!(first == "AK1" || credentials.status().sets > 1, "{first}");
    // Nobody asks for them: the thread replaces them by itself.
    while credentials.status().sets < 2 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let second = key_id(&credentials).await;
    assert_ne!(second, "AK1");
}

#[tokio::test]
async fn an_issuer_that_is_away_changes_nothing_while_the_store_takes_what_we_have() {
    let (credentials, telemetry, _) = Issuer::start(|_| {});
    let first = key_id(&credentials).await;
    {
        let mut state = credentials.shared.state();
        state.failed(Error::new(Code::VaultUnreachable, "vault does not answer"), Instant::now());
        state.not_before = Some(Instant::now() + Duration::from_secs(3600));
        // Only now do they end soon: whoever is held up before would find them replaced.
        let set = state.current.as_mut().expect("a set");
        (set.ttl, set.due) = (Some(Duration::from_millis(200)), Some(Instant::now() + Duration::from_millis(100)));
    }
    credentials.shared.wake.notify_one();
    let status = credentials.status();
    assert_eq!(status.state, "away");
    assert!(status.trouble.expect("told").contains("does not answer"));
    // Past its end by our clock: the store alone decides.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(key_id(&credentials).await, first);
    assert_eq!(telemetry.credentials_issued.get(), 1);
}

#[tokio::test]
async fn who_waits_is_told_why_and_the_next_one_asks_again() {
    let (credentials, telemetry, _) = Issuer::start(|issuer| issuer.failures = AtomicUsize::new(1));
    let error = credentials.get_credential().await.expect_err("the issuer is away");
    let text = format!("{error:?} {error}");
    assert!(text.contains("vault does not answer"), "{text}");
    assert_eq!(key_id(&credentials).await, "AK1");
    assert_eq!(telemetry.credentials_failed.get(), 1);
}

#[tokio::test]
async fn a_set_the_store_took_and_now_refuses_is_replaced_once() {
    let (credentials, telemetry, asked) = Issuer::start(|_| {});
    assert_eq!(key_id(&credentials).await, "AK1");
    credentials.accepted("AK1");
    // Many requests find out at once.
    for _ in 0..10 {
        assert!(credentials.refused("AK1", Some("ExpiredToken")), "worth asking again");
    }
    assert_eq!(key_id(&credentials).await, "AK2");
    assert!(credentials.refused("AK1", Some("ExpiredToken")), "an old one: the new one is there already");
    assert_eq!(asked.try_iter().filter(|what| what == "issue").count(), 2);
    // The store refuses new ones as well: no more of them are asked for.
    for _ in 0..10 {
        assert!(!credentials.refused("AK2", Some("ExpiredToken")));
    }
    assert_eq!(key_id(&credentials).await, "AK2");
    assert_eq!((asked.try_iter().count(), telemetry.credentials_refused.get()), (0, 1));
}

#[derive(Default)]
struct Notes(Mutex<Vec<(Kind, Severity)>>);

impl crate::telemetry::events::Sink for Notes {
    fn take(&self, event: &Event) -> Result<()> {
        self.0.lock().expect("a test").push((event.kind, event.severity));
        Ok(())
    }
}

#[tokio::test]
async fn a_set_that_is_refused_and_replaced_is_no_lost_lease_and_calls_nobody() {
    let (credentials, telemetry, _asked) = Issuer::start(|_| {});
    let notes = Arc::new(Notes::default());
    telemetry.events.add(notes.clone());
    assert_eq!(key_id(&credentials).await, "AK1");
    credentials.accepted("AK1");
    assert!(credentials.refused("AK1", Some("ExpiredToken")));
    assert_eq!(key_id(&credentials).await, "AK2");
    credentials.close();
    let renewal = |severity| (Kind::Renewal, severity);
    // New ones may be there before it is told that the old ones were refused.
    let mut told = notes.0.lock().expect("a test").clone();
    told.sort_by_key(|(_, severity)| *severity);
    assert_eq!(told, [renewal(Severity::Low), renewal(Severity::Low), renewal(Severity::Medium)]);
}

#[tokio::test]
async fn an_issuer_that_refuses_while_there_is_no_set_calls_somebody() {
    let (credentials, telemetry, _asked) = Issuer::start(|_| {});
    let notes = Arc::new(Notes::default());
    telemetry.events.add(notes.clone());
    credentials.shared.failed(Error::new(Code::VaultDenied, "the role is gone"));
    assert_eq!(*notes.0.lock().expect("a test"), [(Kind::Renewal, Severity::High)]);
}

#[tokio::test]
async fn a_policy_that_forbids_is_no_reason_for_new_ones() {
    let (credentials, _, asked) = Issuer::start(|_| {});
    key_id(&credentials).await;
    credentials.accepted("AK1");
    assert!(!credentials.refused("AK1", Some("AccessDenied")));
    assert!(!credentials.refused("AK1", None));
    assert_eq!(asked.try_iter().count(), 1);
}

#[tokio::test]
async fn a_key_the_store_does_not_know_yet_is_tried_again_without_another_one() {
    let (credentials, _, asked) = Issuer::start(|_| {});
    key_id(&credentials).await;
    assert!(credentials.refused("AK1", Some("InvalidAccessKeyId")), "IAM takes a while");
    assert_eq!(key_id(&credentials).await, "AK1");
    assert_eq!(asked.try_iter().count(), 1);
}

#[tokio::test]
async fn a_renewable_lease_is_renewed_and_replaced_when_that_brings_little() {
    let (credentials, telemetry, asked) = Issuer::start(|issuer| {
        issuer.renewable = true;
        issuer.ttl = Duration::from_millis(1500);
    });
    key_id(&credentials).await;
    while credentials.status().sets < 2 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let asked: Vec<String> = asked.try_iter().filter(|what| !what.starts_with("look")).take(3).collect();
    assert_eq!(asked, ["issue", "renew lease-1", "issue"]);
    assert!(telemetry.credentials_renewed.get() >= 1);
}

#[tokio::test]
async fn closing_gives_back_what_can_be_given_back_and_overwrites_it() {
    for temporary in [false, true] {
        let (credentials, _, asked) = Issuer::start(|issuer| issuer.temporary = temporary);
        let held = credentials.get_credential().await.expect("credentials");
        credentials.accepted("AK1");
        credentials.refused("AK1", Some("ExpiredToken"));
        assert_eq!(key_id(&credentials).await, "AK2");
        credentials.close();
        let mut revoked: Vec<String> = asked.try_iter().filter(|what| what.starts_with("revoke")).collect();
        revoked.sort();
        let wanted: &[&str] = if temporary { &[] } else { &["revoke lease-1", "revoke lease-2"] };
        assert_eq!(revoked, wanted, "temporary: {temporary}");
        assert_eq!(held.key_id, "AK1", "a request that signs with it is not disturbed");
        assert_eq!(credentials.status().state, "closed");
        assert!(credentials.get_credential().await.is_err(), "nothing is signed any more");
    }
}

/// What lies there for longer than a request lies in locked memory; tests/secrets.rs looks for it in a whole process.
#[tokio::test]
async fn each_request_gets_a_copy_and_the_last_holder_of_one_is_the_request() {
    let (credentials, _, _) = Issuer::start(|issuer| issuer.temporary = true);
    let (one, other) = (credentials.get_credential().await.expect("a set"), credentials.get_credential().await);
    let other = other.expect("the same set");
    assert_eq!((&one.secret_key, &one.token), (&other.secret_key, &other.token));
    assert_eq!((Arc::strong_count(&one), Arc::strong_count(&other)), (1, 1));
}

/// What is told of a loss.
#[derive(Default)]
struct Losses(Mutex<Vec<(Severity, Option<Code>)>>);

impl Sink for Losses {
    fn take(&self, event: &Event) -> Result<()> {
        if event.kind == Kind::LeaseLost && event.severity >= Severity::High {
            self.0.lock().expect("a test").push((event.severity, event.code));
        }
        Ok(())
    }
}

#[tokio::test]
async fn a_lease_that_somebody_revoked_is_told_as_a_loss_and_replaced_unless_a_loss_shall_last() {
    for stops in [false, true] {
        let (credentials, telemetry, asked) = Issuer::start(|issuer| {
            (issuer.revoked, issuer.stops) = (Some(true), stops);
        });
        let losses = Arc::new(Losses::default());
        telemetry.events.add(losses.clone());
        assert_eq!(key_id(&credentials).await, "AK1");
        credentials.accepted("AK1");
        assert!(credentials.refused("AK1", Some("InvalidAccessKeyId")), "worth asking again");
        if stops {
            let mut lost = credentials.watch_lost();
            let why = lost.wait_for(Option::is_some).await.expect("it goes on").clone().expect("a loss");
            assert_eq!(why.code(), Code::VaultDenied);
            for _ in 0..3 {
                let refused = format!("{:?}", credentials.get_credential().await.expect_err("lost"));
                assert!(refused.contains("was revoked"), "{refused}");
            }
            assert_eq!(credentials.status().state, "lost");
            assert_eq!(asked.try_iter().collect::<Vec<_>>(), ["issue", "look lease-1"], "others were asked for");
            credentials.forgive();
            assert!(credentials.lost().is_none());
        }
        assert_eq!(key_id(&credentials).await, "AK2");
        assert_eq!(*losses.0.lock().expect("a test"), [(Severity::High, Some(Code::VaultDenied))]);
        assert!(credentials.lost().is_none());
    }
}

/// A store may refuse for reasons of its own, and Vault be away: neither is word of anybody.
#[tokio::test]
async fn a_refused_set_whose_lease_is_there_or_not_known_of_or_over_is_replaced_quietly() {
    for (revoked, temporary, over) in
        [(Some(false), false, false), (None, false, false), (Some(true), true, false), (Some(true), false, true)]
    {
        let (credentials, telemetry, asked) = Issuer::start(|issuer| {
            (issuer.revoked, issuer.temporary, issuer.stops) = (revoked, temporary, true);
        });
        let losses = Arc::new(Losses::default());
        telemetry.events.add(losses.clone());
        assert_eq!(key_id(&credentials).await, "AK1");
        credentials.accepted("AK1");
        if over {
            credentials.shared.state().current.as_mut().expect("a set").ttl = Some(Duration::ZERO);
        }
        credentials.refused("AK1", Some("ExpiredToken"));
        assert_eq!(key_id(&credentials).await, "AK2");
        let looked = asked.try_iter().filter(|what| what.starts_with("look")).count();
        assert_eq!(looked, usize::from(!temporary && !over), "{revoked:?} {temporary} {over}");
        assert!(credentials.lost().is_none() && losses.0.lock().expect("a test").is_empty());
    }
}

#[tokio::test]
async fn a_lease_that_cannot_be_renewed_because_somebody_revoked_it_is_a_loss() {
    let (credentials, _, _) = Issuer::start(|issuer| {
        (issuer.renewable, issuer.revoked, issuer.stops) = (true, Some(true), true);
    });
    assert_eq!(key_id(&credentials).await, "AK1");
    credentials.shared.state().current.as_mut().expect("a set").due = Some(Instant::now());
    credentials.shared.wake.notify_one();
    let mut lost = credentials.watch_lost();
    lost.wait_for(Option::is_some).await.expect("it goes on");
    assert!(credentials.get_credential().await.is_err(), "the store need not be asked first");
}

#[tokio::test]
async fn credentials_that_are_no_plain_words_are_refused_without_repeating_them() {
    let issued = Issued {
        key_id: LockedBuf::copy_of(b"AK\r\nx-canary: 1").expect("memory"),
        secret: LockedBuf::copy_of(b"secret-canary").expect("memory"),
        token: None,
        ttl: None,
        lease_id: None,
        renewable: false,
    };
    let error = issued.check_signable().expect_err("a header would be split");
    assert_eq!(error.code(), Code::VaultAnswer);
    assert!(!format!("{error:?}{issued:?}").contains("canary"));
}

#[tokio::test]
async fn neither_debug_nor_status_nor_errors_show_a_secret() {
    let (credentials, _, _) = Issuer::start(|issuer| issuer.temporary = true);
    key_id(&credentials).await;
    let status = serde_json::to_string(&credentials.status()).expect("plain values");
    for text in [format!("{credentials:?}"), status] {
        assert!(!text.contains("canary") && !text.contains("AK1"), "{text}");
    }
}

#[test]
fn they_are_due_at_two_thirds_less_a_random_tenth() {
    let hour = Duration::from_secs(3600);
    assert_eq!(due(hour, 0), Duration::from_secs(2400));
    assert!((2039..=2041).contains(&due(hour, u32::MAX).as_secs()));
    assert_eq!(due(Duration::ZERO, 7), HOLD_MIN, "an issuer of nothing is not asked in a loop");
}

#[test]
fn pauses_double_up_to_their_bound() {
    assert_eq!(pause(1, u32::MAX), PAUSE_FIRST);
    assert_eq!(pause(3, u32::MAX), 4 * PAUSE_FIRST);
    assert_eq!(pause(60, u32::MAX), PAUSE_MAX);
    assert_eq!(pause(60, 0), PAUSE_MAX / 2);
}

//! Storage credentials that end while they are in use: a store that refuses the old ones, an issuer that is away, and the
//! real thing, Vault's aws engine in front of MinIO's STS.
//!
//! What is real: the last tests run HashiCorp Vault and MinIO; every credential in them was issued by one and checked by the
//! other. What is not: 900 s is the least such credentials last, so there the end is brought forward, once by telling the
//! client that they last seconds, and once by changing MinIO's root key, which makes every older set worthless.

mod common;
#[path = "common/dev_vault.rs"]
mod dev_vault;
#[path = "common/program.rs"]
mod program;

use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use common::hostile::{Hostile, Request, honest, object, respond};
use common::minio::Minio;
use dev_vault::DevVault;
use modelfs::error::{Class, Code, Error, Result};
use modelfs::mem::LockedBuf;
use modelfs::store::{ChunkSink, IssueCredentials, Issued, LeasedCredentials, Patience, StoreOptions, open};
use modelfs::telemetry::Telemetry;
use modelfs::vault::AwsRole;

const LEN: usize = 1000;

fn patience() -> Patience {
    Patience {
        pause_first: Duration::from_millis(1),
        pause_max: Duration::from_millis(50),
        budget: Duration::from_secs(120),
        attempt: Duration::from_secs(60),
        ..Patience::default()
    }
}

/// What the store takes and the issuer gives: set number `AK<n>`.
#[derive(Default)]
struct World {
    valid: AtomicU64,
    issued: AtomicU64,
    away: AtomicBool,
    /// Nothing is taken back.
    denies: AtomicBool,
    revoked: Mutex<Vec<String>>,
}

struct Issuer(Arc<World>);

impl IssueCredentials for Issuer {
    fn issue(&self) -> Result<Issued> {
        if self.0.away.load(Ordering::SeqCst) {
            return Err(Error::new(Code::VaultUnreachable, "vault does not answer"));
        }
        self.0.issued.fetch_add(1, Ordering::SeqCst);
        let number = self.0.valid.load(Ordering::SeqCst);
        Ok(Issued {
            key_id: LockedBuf::copy_of(format!("AK{number}").as_bytes())?,
            secret: LockedBuf::copy_of(b"secret-canary-value")?,
            token: None,
            ttl: Some(Duration::from_secs(3600)),
            lease_id: Some(format!("lease-{number}")),
            renewable: false,
        })
    }
    fn renew(&self, _: &str) -> Result<Duration> {
        unreachable!("not renewable")
    }
    fn revoke(&self, lease_id: &str) -> Result<()> {
        if self.0.denies.load(Ordering::SeqCst) {
            return Err(Error::new(Code::VaultDenied, "the token may not use sys/leases/revoke"));
        }
        self.0.revoked.lock().expect("no panic under the lock").push(lease_id.into());
        Ok(())
    }
    fn was_revoked(&self, _: &str) -> Result<bool> {
        Ok(false)
    }
    fn describe(&self) -> String {
        "vault-aws:aws/test".into()
    }
}

type Refusal = fn(&mut TcpStream) -> std::io::Result<()>;

/// A server that takes only the newest set and refuses the others like this.
fn server(world: &Arc<World>, refusal: Refusal) -> Hostile {
    let world = world.clone();
    Hostile::start(move |request: &Request, stream: &mut TcpStream| {
        let wanted = format!("Credential=AK{}/", world.valid.load(Ordering::SeqCst));
        if !request.header("authorization").is_some_and(|header| header.contains(&wanted)) {
            return refusal(stream);
        }
        match request.method.as_str() {
            "PUT" => respond(stream, "200 OK", &[], b""),
            _ if request.target.contains("/k/") => respond(stream, "404 Not Found", &[], b""),
            _ => honest(request, stream, LEN),
        }
    })
}

fn expired(stream: &mut TcpStream) -> std::io::Result<()> {
    respond(stream, "400 Bad Request", &[], b"<Error><Code>ExpiredToken</Code></Error>")
}

fn unknown_key(stream: &mut TcpStream) -> std::io::Result<()> {
    respond(stream, "403 Forbidden", &[], b"<Error><Code>InvalidAccessKeyId</Code></Error>")
}

fn forbidden(stream: &mut TcpStream) -> std::io::Result<()> {
    respond(stream, "403 Forbidden", &[], b"<Error><Code>AccessDenied</Code></Error>")
}

fn store(server: &Hostile, world: &Arc<World>) -> (Arc<dyn ChunkSink>, Arc<LeasedCredentials>, Arc<Telemetry>) {
    let telemetry = Arc::new(Telemetry::default());
    let credentials = Arc::new(LeasedCredentials::new(Box::new(Issuer(world.clone())), telemetry.clone()));
    let opts = StoreOptions {
        // Static keys are there as well, and must not be used.
        aws: server.settings(),
        ignore_environment: true,
        patience: patience(),
        telemetry: telemetry.clone(),
        credentials: Some(credentials.clone()),
        ..StoreOptions::default()
    };
    (open(&"s3://models/prefix".parse().expect("a URL"), &opts).expect("settings"), credentials, telemetry)
}

/// The store stops taking the set in use, several times, under reads that never stop: not one of them notices.
#[tokio::test(flavor = "multi_thread")]
async fn reads_go_on_without_an_error_while_the_store_refuses_the_old_credentials() {
    for refusal in [expired as Refusal, unknown_key] {
        let world = Arc::new(World::default());
        let server = server(&world, refusal);
        let (store, _, telemetry) = store(&server, &world);
        let readers = (0..8).map(|_| {
            let (store, world) = (store.clone(), world.clone());
            tokio::spawn(async move {
                for number in 0..60 {
                    if number % 20 == 10 {
                        // Each end is brought about by one reader: `number` names it.
                        let _ = world.valid.compare_exchange(
                            number / 20,
                            number / 20 + 1,
                            Ordering::SeqCst,
                            Ordering::SeqCst,
                        );
                    }
                    let pieces = store.read_range("m/d/x", 100..200).await.expect("served");
                    assert_eq!(pieces.concat(), object(LEN)[100..200]);
                }
            })
        });
        for reader in futures::future::join_all(readers).await {
            reader.expect("every read was served");
        }
        assert_eq!(world.valid.load(Ordering::SeqCst), 3);
        assert_eq!(telemetry.credentials_refused.get(), 3, "each set was replaced once");
        assert_eq!(world.issued.load(Ordering::SeqCst), 4);
        assert!(
            server.requests().iter().all(|request| {
                request.header("authorization").is_some_and(|header| !header.contains("AKIDCANARY"))
            })
        );
    }
}

/// What writes are signed with is replaced likewise, also within a call.
#[tokio::test]
async fn a_write_that_is_refused_for_its_credentials_is_sent_again() {
    let world = Arc::new(World::default());
    let server = server(&world, expired);
    let (store, _, _) = store(&server, &world);
    store.read_range("m/d/x", 0..10).await.expect("served");
    world.valid.store(1, Ordering::SeqCst);
    store.create("m/k/x", Bytes::from_static(b"slots")).await.expect("written");
    world.valid.store(2, Ordering::SeqCst);
    store.read_range("m/d/x", 0..10).await.expect("served");
}

#[tokio::test]
async fn a_store_that_refuses_new_ones_as_well_is_told_as_it_is_and_asked_for_no_more() {
    let world = Arc::new(World::default());
    let server = Hostile::start(|_: &Request, stream: &mut TcpStream| expired(stream));
    let (store, _, _) = store(&server, &world);
    for _ in 0..5 {
        let error = store.read_range("m/d/x", 0..10).await.expect_err("refused");
        assert_eq!(error.code(), Code::StoreDenied, "{}", error.chain());
        assert!(!error.chain().contains("canary"));
    }
    assert_eq!(world.issued.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_policy_that_forbids_costs_the_issuer_nothing() {
    let world = Arc::new(World::default());
    let server = Hostile::start(|_: &Request, stream: &mut TcpStream| forbidden(stream));
    let (store, _, _) = store(&server, &world);
    for _ in 0..5 {
        assert_eq!(store.read_range("m/d/x", 0..10).await.expect_err("refused").code(), Code::StoreDenied);
    }
    assert_eq!(world.issued.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn an_issuer_that_is_away_stops_nothing_until_the_store_refuses_and_then_is_named() {
    let world = Arc::new(World::default());
    let server = server(&world, expired);
    let (store, credentials, telemetry) = store(&server, &world);
    store.read_range("m/d/x", 0..10).await.expect("served");
    world.away.store(true, Ordering::SeqCst);
    for _ in 0..20 {
        store.read_range("m/d/x", 0..10).await.expect("the set in use goes on");
    }
    world.valid.store(1, Ordering::SeqCst);
    let error = store.read_range("m/d/x", 0..10).await.expect_err("nobody gives new ones");
    assert_eq!(error.class(), Class::Unreachable);
    assert!(error.chain().contains("vault does not answer"), "{}", error.chain());
    assert!(telemetry.credentials_failed.get() >= 1);
    assert_eq!(credentials.status().state, "away");
    world.away.store(false, Ordering::SeqCst);
    store.read_range("m/d/x", 0..10).await.expect("served again");
    assert_eq!(credentials.status().state, "current");
    assert!(credentials.status().trouble.is_none());
}

#[tokio::test]
async fn what_can_be_given_back_is_given_back_at_the_end() {
    let world = Arc::new(World::default());
    let server = server(&world, expired);
    let (store, credentials, _) = store(&server, &world);
    store.read_range("m/d/x", 0..10).await.expect("served");
    assert!(credentials.close().is_none());
    assert_eq!(*world.revoked.lock().expect("whole"), ["lease-0"]);
    assert!(store.read_range("m/d/x", 0..10).await.is_err(), "nothing is signed any more");
}

/// Whoever closes may know that it ends all the same, with the token that took it.
#[tokio::test]
async fn a_lease_that_is_not_taken_back_is_named_to_whoever_closes() {
    let world = Arc::new(World::default());
    let server = server(&world, expired);
    let (store, credentials, _) = store(&server, &world);
    store.read_range("m/d/x", 0..10).await.expect("served");
    world.denies.store(true, Ordering::SeqCst);
    let kept = credentials.close().expect("it goes on");
    assert!(kept.chain().contains("sys/leases/revoke"), "{}", kept.chain());
    assert!(credentials.close().is_none(), "said once");
}

/// Vault's aws engine in front of MinIO's STS, as docs/KEYS.md sets it up.
fn real() -> Option<(DevVault, Minio)> {
    let (vault, minio) = (DevVault::start()?, Minio::start()?);
    vault.admin(&["secrets", "enable", "aws"]);
    tell_root_key(&vault, &minio, minio.root_secret());
    vault.admin(&[
        "write",
        "aws/roles/models",
        "credential_type=assumed_role",
        "role_arns=arn:aws:iam::123456789012:role/models",
        "default_sts_ttl=900s",
        "max_sts_ttl=3600s",
    ]);
    Some((vault, minio))
}

fn tell_root_key(vault: &DevVault, minio: &Minio, secret: &str) {
    vault.admin(&[
        "write",
        "aws/config/root",
        &format!("access_key={}", Minio::ROOT_KEY),
        &format!("secret_key={secret}"),
        "region=us-east-1",
        &format!("iam_endpoint={}", minio.endpoint()),
        &format!("sts_endpoint={}", minio.endpoint()),
    ]);
}

/// Real credentials that say that they end sooner than they do.
struct Short(AwsRole);

impl IssueCredentials for Short {
    fn issue(&self) -> Result<Issued> {
        Ok(Issued { ttl: Some(Duration::from_secs(3)), ..self.0.issue()? })
    }
    fn renew(&self, lease_id: &str) -> Result<Duration> {
        self.0.renew(lease_id)
    }
    fn revoke(&self, lease_id: &str) -> Result<()> {
        self.0.revoke(lease_id)
    }
    fn was_revoked(&self, lease_id: &str) -> Result<bool> {
        self.0.was_revoked(lease_id)
    }
    fn describe(&self) -> String {
        self.0.describe()
    }
}

fn real_store(
    issuer: impl IssueCredentials + 'static,
    minio: &Minio,
) -> (Arc<dyn ChunkSink>, Arc<LeasedCredentials>, Arc<Telemetry>) {
    let telemetry = Arc::new(Telemetry::default());
    let credentials = Arc::new(LeasedCredentials::new(Box::new(issuer), telemetry.clone()));
    let opts = StoreOptions {
        aws: vec![("AWS_ENDPOINT_URL".into(), minio.endpoint()), ("AWS_REGION".into(), "us-east-1".into())],
        ignore_environment: true,
        // Longer than the server takes to start again.
        patience: Patience { budget: Duration::from_secs(240), attempts_max: 100_000, ..patience() },
        telemetry: telemetry.clone(),
        credentials: Some(credentials.clone()),
        ..StoreOptions::default()
    };
    (open(&"s3://models/prefix".parse().expect("a URL"), &opts).expect("settings"), credentials, telemetry)
}

#[tokio::test(flavor = "multi_thread")]
async fn vaults_credentials_are_replaced_under_running_reads_of_a_real_store() {
    let Some((vault, minio)) = real() else { return };
    let issuer = Short(AwsRole::new(vault.client(), "aws", "models"));
    let (store, credentials, telemetry) = real_store(issuer, &minio);
    let bytes = Bytes::from(object(1 << 20));
    store.create("m/k/x", bytes.clone()).await.expect("written with credentials of STS");
    let mut reads = 0;
    while credentials.status().sets < 3 {
        let range = (reads % 1000) * 1000..(reads % 1000) * 1000 + 500;
        let pieces = store.read_range("m/k/x", range.clone()).await.expect("served");
        assert!(pieces.concat() == bytes[range.start as usize..range.end as usize]);
        reads += 1;
    }
    assert_eq!(telemetry.credentials_failed.get(), 0);
    assert_eq!(telemetry.credentials_refused.get(), 0, "replaced before the store had to refuse");
    println!("{reads} reads while {} sets were replaced", telemetry.credentials_issued.get() - 1);
}

/// MinIO's root key is changed: every set that it gave out is refused from then on, by the server itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_real_store_that_refuses_the_old_set_is_read_on_with_a_new_one() {
    let Some((vault, mut minio)) = real() else { return };
    let issuer = AwsRole::new(vault.client(), "aws", "models");
    let (store, credentials, telemetry) = real_store(issuer, &minio);
    let bytes = Bytes::from(object(1 << 20));
    store.create("m/k/x", bytes.clone()).await.expect("written");
    assert_eq!(credentials.status().sets, 1);
    let ends = credentials.status().ends_in_seconds.expect("they end");
    assert!((800..=900).contains(&ends), "what Vault says: {ends}");

    let reader = tokio::spawn({
        let store = store.clone();
        async move {
            let mut reads = 0;
            while credentials.status().sets < 2 {
                store.read_range("m/k/x", 0..1000).await?;
                reads += 1;
            }
            store.read_range("m/k/x", 0..1000).await?;
            Ok::<u64, Error>(reads)
        }
    });
    // On this thread, which stays to the end: the kernel ends a server with the thread that started it.
    // Vault first: what it is asked for once the store refuses must be of the new key.
    tell_root_key(&vault, &minio, "another-root-secret-0123");
    minio.change_root_secret("another-root-secret-0123");
    let reads = reader.await.expect("no panic").expect("not one read failed");
    assert_eq!(telemetry.credentials_refused.get(), 1);
    println!("{reads} reads before and while the store changed its mind");
}

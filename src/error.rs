//! The one error type and the one table: code -> class -> errno, exit code, retry.
//!
//! In: a [`Code`] (the name a test, a log line and an operator's runbook share) and a sentence. Out: everything that a
//! failure decides: what the kernel is told, what the shell sees, whether the store is asked again.
//! Promises: nobody else maps errno or exit codes; a message names the thing, what was seen, what was wanted.
//! Never in a message: keys, plaintext, chunk bytes, signed URLs.
//! Held by: the tests below and `tests/hostile_*.rs`, which match on codes.

use std::fmt;
use std::sync::Arc;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of trouble it is: the row of the table that decides errno, exit code and retry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// The store's or the host's bytes are not what was signed, sealed or promised.
    Tampered,
    /// The thing moved under us: a name that no longer leads where it led.
    Changed,
    /// The store did not answer in time, or the network failed.
    Unreachable,
    /// No room: locked memory, handles, requests in flight.
    NoRoom,
    /// Someone still holds files when asked to stop.
    Held,
    /// Flags, configuration, limits, file modes: the user can fix it.
    Usage,
    /// The named thing is not there.
    NotFound,
    /// No key given opens this, or the store refused our credentials.
    Denied,
    /// Strict checks found a weakness of the machine or the set-up.
    Insecure,
    /// The local machine failed us: disk, memory map, kernel call.
    Host,
}

impl Class {
    /// The errno a reader gets through the mount.
    pub const fn errno(self) -> i32 {
        match self {
            Class::Tampered | Class::Unreachable | Class::Host => libc::EIO,
            Class::Changed => libc::ESTALE,
            Class::NoRoom => libc::ENOMEM,
            Class::Held => libc::EBUSY,
            Class::Usage => libc::EINVAL,
            Class::NotFound => libc::ENOENT,
            Class::Denied => libc::EACCES,
            Class::Insecure => libc::EPERM,
        }
    }

    /// The exit code of a command that ends with this class.
    pub const fn exit_code(self) -> u8 {
        match self {
            Class::Host => 1,
            Class::Usage => 2,
            Class::NotFound => 3,
            Class::Tampered => 20,
            Class::Changed => 21,
            Class::Unreachable => 22,
            Class::NoRoom => 23,
            Class::Held => 24,
            Class::Denied => 25,
            Class::Insecure => 26,
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            Class::Tampered => "tampered",
            Class::Changed => "changed",
            Class::Unreachable => "unreachable",
            Class::NoRoom => "no-room",
            Class::Held => "held",
            Class::Usage => "usage",
            Class::NotFound => "not-found",
            Class::Denied => "denied",
            Class::Insecure => "insecure",
            Class::Host => "host",
        }
    }
}

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $class:ident;)*) => {
        /// Every named failure. The names are a contract: logs, `--json` and docs/FORMAT.md use them.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Code { $($(#[$doc])* $variant,)* }
        impl Code {
            pub const ALL: &'static [Code] = &[$(Code::$variant,)*];
            pub const fn name(self) -> &'static str { match self { $(Code::$variant => $name,)* } }
            pub const fn class(self) -> Class { match self { $(Code::$variant => Class::$class,)* } }
        }
    };
}

codes! {
    // Data objects.
    /// The hash of a fetched chunk is not the signed one: storage or transit fault, or tampering.
    ChunkHash = "CHUNK_HASH", Tampered;
    /// A block's tag is wrong although its chunk hash was right or not asked for: wrong key, or forged.
    Tag = "TAG", Tampered;
    Coded = "CODED", Tampered;
    /// More or fewer bytes than the layout says.
    Length = "LENGTH", Tampered;
    /// A data object's clear header is not the one the manifest implies.
    Header = "HEADER", Tampered;
    /// A file's plaintext SHA-256 is not the signed one.
    FileHash = "FILE_HASH", Tampered;
    // Refs.
    RefLength = "REF_LENGTH", Tampered;
    RefSig = "REF_SIG", Tampered;
    RefKey = "REF_KEY", Tampered;
    RefModel = "REF_MODEL", Tampered;
    RefChannel = "REF_CHANNEL", Tampered;
    RefFormat = "REF_FORMAT", Tampered;
    Rollback = "ROLLBACK", Tampered;
    Fork = "FORK", Tampered;
    FastForward = "FAST_FORWARD", Tampered;
    RefExpired = "REF_EXPIRED", Tampered;
    RefFuture = "REF_FUTURE", Tampered;
    Clock = "CLOCK", Tampered;
    BelowFloor = "BELOW_FLOOR", Tampered;
    // Manifest.
    ManDigest = "MAN_DIGEST", Tampered;
    ManLen = "MAN_LEN", Tampered;
    ManLength = "MAN_LENGTH", Tampered;
    ManSig = "MAN_SIG", Tampered;
    ManFormat = "MAN_FORMAT", Tampered;
    ManModel = "MAN_MODEL", Tampered;
    BodyLength = "BODY_LENGTH", Tampered;
    BodyTag = "BODY_TAG", Tampered;
    Limit = "LIMIT", Tampered;
    Path = "PATH", Tampered;
    ManifestOrder = "MANIFEST_ORDER", Tampered;
    ManifestTree = "MANIFEST_TREE", Tampered;
    Extent = "EXTENT", Tampered;
    Object = "OBJECT", Tampered;
    Mode = "MODE", Tampered;
    Unsupported = "UNSUPPORTED", Tampered;
    // Commitments and slots.
    Commit = "COMMIT", Tampered;
    DekCommit = "DEK_COMMIT", Tampered;
    SlotCommit = "SLOT_COMMIT", Tampered;
    SlotsFormat = "SLOTS_FORMAT", Tampered;
    SlotsChecksum = "SLOTS_CHECKSUM", Tampered;
    SlotsLimit = "SLOTS_LIMIT", Tampered;
    SlotsRollback = "SLOTS_ROLLBACK", Tampered;
    SlotsModel = "SLOTS_MODEL", Tampered;
    SlotLabel = "SLOT_LABEL", Tampered;
    SlotBody = "SLOT_BODY", Tampered;
    SlotParams = "SLOT_PARAMS", Tampered;
    // Keys and trust, local.
    /// No slot opened with any key source given.
    NoKey = "NO_KEY", Denied;
    KeyFormat = "KEY_FORMAT", Usage;
    KeyPerms = "KEY_PERMS", Usage;
    /// No trusted signing key for this model.
    NoTrust = "NO_TRUST", Usage;
    NoFloor = "NO_FLOOR", Usage;
    /// The local state file cannot be read, parsed or written.
    State = "STATE", Host;
    // Store.
    NotFound = "NOT_FOUND", NotFound;
    Exists = "EXISTS", Changed;
    Unreachable = "UNREACHABLE", Unreachable;
    Deadline = "DEADLINE", Unreachable;
    StoreDenied = "STORE_DENIED", Denied;
    /// The store answered what is never followed or decoded: a redirect, an encoded body, a broken listing.
    StoreAnswer = "STORE_ANSWER", Tampered;
    /// The store does not keep create-only promises: nothing may be published to it.
    StoreUnfit = "STORE_UNFIT", Usage;
    /// The local store folder is not ours alone, or leads out of its root.
    StorePerms = "STORE_PERMS", Usage;
    // Vault.
    /// Vault does not answer, or not in time.
    VaultUnreachable = "VAULT_UNREACHABLE", Unreachable;
    /// Vault answers, but is sealed, not initialised, or in standby without a leader.
    VaultSealed = "VAULT_SEALED", Unreachable;
    /// Vault knows us and does not let us: no permission, a wrong, expired, revoked or used-up credential.
    VaultDenied = "VAULT_DENIED", Denied;
    /// What was asked of Vault is not there: a mount, a key, a version, a field.
    VaultNotFound = "VAULT_NOT_FOUND", NotFound;
    /// An answer that is no answer of Vault's: HTML, a redirect, too long, of another shape.
    VaultAnswer = "VAULT_ANSWER", Tampered;
    /// A catalog record and the sealed model it names do not agree.
    Catalog = "CATALOG", Tampered;
    // Sealing.
    Source = "SOURCE", Usage;
    SourceChanged = "SOURCE_CHANGED", Changed;
    /// An OpenSSF model-signing bundle does not vouch for these files.
    Oms = "OMS", Tampered;
    // Running.
    /// The model, the mount or this reader was shut out by the operator or by a revoked credential.
    Locked = "LOCKED", Denied;
    /// What was to happen cannot be recorded, and must not happen without.
    Audit = "AUDIT", Denied;
    /// The audit log is not the one that was written.
    AuditChain = "AUDIT_CHAIN", Tampered;
    /// The policy, or what the operator lets be sealed and mounted, says no.
    Policy = "POLICY", Denied;
    /// More opens or bytes a second than the policy lets a user have.
    OverLimit = "OVER_LIMIT", Held;
    NoRoom = "NO_ROOM", NoRoom;
    Memlock = "MEMLOCK", Usage;
    Stale = "STALE", Changed;
    Held = "HELD", Held;
    Usage = "USAGE", Usage;
    MountPoint = "MOUNT_POINT", Usage;
    NotMounted = "NOT_MOUNTED", NotFound;
    /// An archive that `modelfs scan` cannot read to its end: broken, cut, or more than the limits allow.
    Archive = "ARCHIVE", Tampered;
    /// `modelfs run --strict` found an error, or a weakness through which secrets could leak; or `modelfs scan` found weights.
    Insecure = "INSECURE", Insecure;
    /// The filesystem is stopping: no new work is taken.
    Stopping = "STOPPING", Unreachable;
    Host = "HOST", Host;
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A failure: its code, one sentence, and the cause it came from. Cheap to clone, so that every reader of a chunk that
/// failed gets the same answer.
#[derive(Clone)]
pub struct Error {
    code: Code,
    message: String,
    source: Option<Arc<dyn std::error::Error + Send + Sync + 'static>>,
}

impl Error {
    /// `message`: lower case, no full stop, which thing, seen against wanted, what to do.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Error { code, message: message.into(), source: None }
    }

    /// An operating-system failure of `what`, with errno as the cause.
    pub fn os(code: Code, what: impl Into<String>) -> Self {
        Error::new(code, what).with_source(std::io::Error::last_os_error())
    }

    pub fn with_source(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.source = Some(Arc::new(source));
        self
    }

    /// The same failure, told of a larger thing: `context` becomes the message, this error its cause. The code stays.
    pub fn context(self, context: impl Into<String>) -> Self {
        Error { code: self.code, message: context.into(), source: Some(Arc::new(self)) }
    }

    pub fn code(&self) -> Code {
        self.code
    }
    pub fn class(&self) -> Class {
        self.code.class()
    }
    pub fn errno(&self) -> i32 {
        self.class().errno()
    }
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The message, then each cause on the same line, as the command line prints it once at the edge.
    pub fn chain(&self) -> String {
        let mut text = self.message.clone();
        let mut cause = std::error::Error::source(self);
        while let Some(next) = cause {
            let part = match next.downcast_ref::<Error>() {
                Some(ours) => ours.message.clone(),
                None => next.to_string(),
            };
            text.push_str(": ");
            text.push_str(&part);
            cause = next.source();
        }
        text
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} [{}]", self.message, self.code)
    }
}
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.chain())
    }
}
impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|s| s as _)
    }
}

/// `Err(Error::new(code, format!(...)))` in one word, for parsers that refuse a lot.
#[macro_export]
macro_rules! refuse {
    ($code:ident, $($arg:tt)*) => {
        return Err($crate::error::Error::new($crate::error::Code::$code, format!($($arg)*)))
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_codes_are_distinct_upper_case_words() {
        let mut seen = std::collections::HashSet::new();
        for code in Code::ALL {
            assert!(seen.insert(code.name()), "{code} twice");
            assert!(code.name().chars().all(|c| c.is_ascii_uppercase() || c == '_'), "{code}");
        }
    }

    #[test]
    fn a_context_keeps_the_code_and_the_chain_is_told_once() {
        let inner = Error::new(Code::Tag, "block 3 of chunk 17 failed authentication");
        let outer = inner.context("cannot read model.safetensors");
        assert_eq!(outer.code(), Code::Tag);
        assert_eq!(outer.chain(), "cannot read model.safetensors: block 3 of chunk 17 failed authentication");
    }
}

//! Key slots: the DEK of a version, wrapped for each key that may open it.
//!
//! In: hostile bytes; a slots object has no signature. Its authority is the commitment in the signed manifest, so a
//! tampered one can only fail. Out: slots whose lengths, labels and cost parameters are within bounds *before* any
//! password hash runs.
//! Promises: slot types of later formats are kept, byte for byte, and used by nobody.
//! Spec: docs/FORMAT.md a.7.

use super::limits::{
    ARGON2_M_KIB, ARGON2_P, ARGON2_T, PBKDF2_ITERATIONS, SCRYPT_LOG2_N, SLOT_BODY_BYTES_MAX, SLOT_LABEL_BYTES_MAX,
    SLOT_PARAMS_BYTES_MAX, SLOT_TRANSIT_BYTES_MAX, SLOT_WRAP_LEN, SLOTS_BYTES_MAX, SLOTS_MAX,
};
use super::wire::{array_at, is_zero, put, u16_at, u32_at};
use super::{FORMAT_VERSION, KeyId, ModelId, SLOTS_HEADER_LEN, Vid, is_label, sha256};
use crate::error::Result;
use crate::refuse;

const MAGIC: &[u8; 8] = b"MFS1SLOT";
const CHECKSUM_LEN: usize = 32;
const SLOT_HEADER_LEN: usize = 8;

/// What kind of key opens a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SlotKind {
    /// 32 bytes from a file or the environment.
    Raw,
    /// A passphrase, by scrypt with r = 8, p = 1.
    Scrypt,
    /// A passphrase, by Argon2id version 0x13.
    Argon2id,
    /// 32 bytes in one version of a Vault KV v2 secret.
    VaultKv,
    /// Vault's transit engine decrypts the DEK itself.
    VaultTransit,
    /// An X25519 key pair: whoever has the public half seals, the holder of the secret half opens.
    HpkeX25519,
    /// A passphrase, by PBKDF2-HMAC-SHA512: read, never written, because graphics cards guess it cheaply.
    Pbkdf2Sha512,
    /// Of a later format; skipped.
    Unknown(u16),
}

impl SlotKind {
    pub const fn from_u16(number: u16) -> SlotKind {
        match number {
            1 => SlotKind::Raw,
            2 => SlotKind::Scrypt,
            3 => SlotKind::Argon2id,
            4 => SlotKind::VaultKv,
            5 => SlotKind::VaultTransit,
            6 => SlotKind::HpkeX25519,
            8 => SlotKind::Pbkdf2Sha512,
            other => SlotKind::Unknown(other),
        }
    }

    pub const fn number(self) -> u16 {
        match self {
            SlotKind::Raw => 1,
            SlotKind::Scrypt => 2,
            SlotKind::Argon2id => 3,
            SlotKind::VaultKv => 4,
            SlotKind::VaultTransit => 5,
            SlotKind::HpkeX25519 => 6,
            SlotKind::Pbkdf2Sha512 => 8,
            SlotKind::Unknown(number) => number,
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            SlotKind::Raw => "raw",
            SlotKind::Scrypt => "scrypt",
            SlotKind::Argon2id => "argon2id",
            SlotKind::VaultKv => "vault-kv",
            SlotKind::VaultTransit => "vault-transit",
            SlotKind::HpkeX25519 => "hpke-x25519",
            SlotKind::Pbkdf2Sha512 => "pbkdf2-sha512",
            SlotKind::Unknown(_) => "unknown",
        }
    }
}

/// What the opener of a slot needs beside the key; every number within the bounds of `limits`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SlotParams {
    Raw {
        salt: [u8; 32],
    },
    Scrypt {
        log2_n: u8,
        salt: [u8; 32],
    },
    Argon2id {
        m_kib: u32,
        t: u32,
        p: u32,
        salt: [u8; 32],
    },
    VaultKv {
        version: u32,
        salt: [u8; 32],
    },
    VaultTransit,
    /// SHA-256 of the recipient's raw public key.
    HpkeX25519 {
        recipient: KeyId,
    },
    Pbkdf2Sha512 {
        iterations: u32,
        salt: [u8; 32],
    },
    Unknown {
        kind: u16,
        params: Vec<u8>,
    },
}

impl SlotParams {
    pub const fn kind(&self) -> SlotKind {
        match self {
            SlotParams::Raw { .. } => SlotKind::Raw,
            SlotParams::Scrypt { .. } => SlotKind::Scrypt,
            SlotParams::Argon2id { .. } => SlotKind::Argon2id,
            SlotParams::VaultKv { .. } => SlotKind::VaultKv,
            SlotParams::VaultTransit => SlotKind::VaultTransit,
            SlotParams::HpkeX25519 { .. } => SlotKind::HpkeX25519,
            SlotParams::Pbkdf2Sha512 { .. } => SlotKind::Pbkdf2Sha512,
            SlotParams::Unknown { kind, .. } => SlotKind::Unknown(*kind),
        }
    }

    pub fn encode(&self) -> Vec<u8> {
        match self {
            SlotParams::Raw { salt } => salt.to_vec(),
            SlotParams::Scrypt { log2_n, salt } => [&[*log2_n][..], salt].concat(),
            SlotParams::Argon2id { m_kib, t, p, salt } => {
                [&m_kib.to_le_bytes()[..], &t.to_le_bytes(), &p.to_le_bytes(), salt].concat()
            }
            SlotParams::VaultKv { version, salt } => [&version.to_le_bytes()[..], salt].concat(),
            SlotParams::VaultTransit => Vec::new(),
            SlotParams::HpkeX25519 { recipient } => recipient.0.to_vec(),
            SlotParams::Pbkdf2Sha512 { iterations, salt } => [&iterations.to_le_bytes()[..], salt].concat(),
            SlotParams::Unknown { params, .. } => params.clone(),
        }
    }

    fn parse(kind: SlotKind, bytes: &[u8]) -> Result<SlotParams> {
        let want = match kind {
            SlotKind::Raw => 32,
            SlotKind::Scrypt => 33,
            SlotKind::Argon2id => 44,
            SlotKind::VaultKv => 36,
            SlotKind::VaultTransit => 0,
            SlotKind::HpkeX25519 => 32,
            SlotKind::Pbkdf2Sha512 => 36,
            SlotKind::Unknown(kind) => return Ok(SlotParams::Unknown { kind, params: bytes.to_vec() }),
        };
        if bytes.len() != want {
            refuse!(SlotParams, "{} slot has {} bytes of parameters, not {want}", kind.name(), bytes.len());
        }
        match kind {
            SlotKind::Raw => Ok(SlotParams::Raw { salt: array_at(bytes, 0) }),
            SlotKind::Scrypt => {
                let log2_n = bytes[0];
                if !SCRYPT_LOG2_N.contains(&log2_n) {
                    refuse!(SlotParams, "scrypt slot asks for N = 2^{log2_n}, 2^15 to 2^20 are allowed");
                }
                Ok(SlotParams::Scrypt { log2_n, salt: array_at(bytes, 1) })
            }
            SlotKind::Argon2id => {
                let (m_kib, t, p) = (u32_at(bytes, 0), u32_at(bytes, 4), u32_at(bytes, 8));
                if !(ARGON2_M_KIB.contains(&m_kib) && ARGON2_T.contains(&t) && ARGON2_P.contains(&p)) {
                    refuse!(
                        SlotParams,
                        "argon2id slot asks for {m_kib} KiB, {t} passes, {p} lanes; 19456 KiB to 2 GiB, 1 to 10, 1 to 16 \
                         are allowed"
                    );
                }
                Ok(SlotParams::Argon2id { m_kib, t, p, salt: array_at(bytes, 12) })
            }
            SlotKind::VaultKv => {
                let version = u32_at(bytes, 0);
                // To Vault, version 0 is whatever is newest: the opposite of one exact version.
                if version == 0 {
                    refuse!(SlotParams, "vault-kv slot names no version");
                }
                Ok(SlotParams::VaultKv { version, salt: array_at(bytes, 4) })
            }
            SlotKind::VaultTransit => Ok(SlotParams::VaultTransit),
            SlotKind::HpkeX25519 => Ok(SlotParams::HpkeX25519 { recipient: KeyId(array_at(bytes, 0)) }),
            SlotKind::Pbkdf2Sha512 => {
                let iterations = u32_at(bytes, 0);
                if !PBKDF2_ITERATIONS.contains(&iterations) {
                    refuse!(
                        SlotParams,
                        "pbkdf2-sha512 slot asks for {iterations} iterations, 100,000 to 10,000,000 are allowed"
                    );
                }
                Ok(SlotParams::Pbkdf2Sha512 { iterations, salt: array_at(bytes, 4) })
            }
            SlotKind::Unknown(_) => unreachable!("returned above"),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// A logical name; where the key really lies is local configuration.
    pub label: String,
    pub params: SlotParams,
    /// The 80-byte wrap, 80 bytes of HPKE (`enc || ciphertext || tag`), or transit's own text.
    pub body: Vec<u8>,
}

impl Slot {
    pub fn kind(&self) -> SlotKind {
        self.params.kind()
    }

    /// How it is named to people and in records: `KIND/LABEL`.
    pub fn title(&self) -> String {
        format!("{}/{}", self.kind().name(), self.label)
    }

    /// What the wrap key is derived with: `header || label || params || model_id || vid || dek_commit`. It names the
    /// length of the body, so it is known before the body is.
    pub fn wrap_context(
        label: &str,
        params: &SlotParams,
        model_id: ModelId,
        vid: Vid,
        dek_commit: &[u8; 32],
    ) -> Vec<u8> {
        let encoded = params.encode();
        let header = slot_header(params.kind(), label.len(), encoded.len(), SLOT_WRAP_LEN);
        [&header[..], label.as_bytes(), &encoded, &model_id.0, &vid.0, dek_commit].concat()
    }

    /// What transit derives the key of a version with: `SHA-256("MFS1/transit" || 0 || model_id || vid)`.
    pub fn transit_context(model_id: ModelId, vid: Vid) -> [u8; 32] {
        sha256(&[b"MFS1/transit\0", &model_id.0, &vid.0])
    }

    fn encode_into(&self, out: &mut Vec<u8>) {
        let params = self.params.encode();
        out.extend(slot_header(self.kind(), self.label.len(), params.len(), self.body.len()));
        out.extend(self.label.as_bytes());
        out.extend(params);
        out.extend(&self.body);
    }

    /// The first slot of `bytes`, and what follows it.
    fn parse(bytes: &[u8]) -> Result<(Slot, &[u8])> {
        let Some((header, rest)) = bytes.split_at_checked(SLOT_HEADER_LEN) else {
            refuse!(SlotsFormat, "slot header is cut off after {} bytes", bytes.len());
        };
        let kind = SlotKind::from_u16(u16_at(header, 0));
        let lens = [2, 4, 6].map(|at| usize::from(u16_at(header, at)));
        let [label_len, params_len, body_len] = lens;
        if !(1..=SLOT_LABEL_BYTES_MAX).contains(&label_len) {
            refuse!(SlotLabel, "slot label of {label_len} bytes, 1 to {SLOT_LABEL_BYTES_MAX} are allowed");
        }
        if params_len > SLOT_PARAMS_BYTES_MAX || body_len > SLOT_BODY_BYTES_MAX {
            refuse!(
                SlotsLimit,
                "slot with {params_len} bytes of parameters and {body_len} of body, 256 and 1024 are allowed"
            );
        }
        let Some((fields, rest)) = rest.split_at_checked(label_len + params_len + body_len) else {
            refuse!(SlotsFormat, "slot is cut off: {} bytes left of {}", rest.len(), lens.iter().sum::<usize>());
        };
        let (label, fields) = fields.split_at(label_len);
        let (params, body) = fields.split_at(params_len);
        let label = check_label(label)?.to_owned();
        let params = SlotParams::parse(kind, params)?;
        check_body(kind, body)?;
        Ok((Slot { label, params, body: body.to_vec() }, rest))
    }
}

fn slot_header(kind: SlotKind, label_len: usize, params_len: usize, body_len: usize) -> [u8; SLOT_HEADER_LEN] {
    // Saturating: a length that does not fit is above its limit and refused when the slots are encoded.
    let len = |len: usize| u16::try_from(len).unwrap_or(u16::MAX).to_le_bytes();
    let mut header = [0u8; SLOT_HEADER_LEN];
    put(&mut header, 0, &kind.number().to_le_bytes());
    put(&mut header, 2, &len(label_len));
    put(&mut header, 4, &len(params_len));
    put(&mut header, 6, &len(body_len));
    header
}

/// `[a-z0-9._-]{1,64}`: nothing that a path, a URL or a shell could make sense of.
///
/// # Errors
/// `SLOT_LABEL`.
pub fn check_label(label: &[u8]) -> Result<&str> {
    match std::str::from_utf8(label) {
        Ok(text) if is_label(label, SLOT_LABEL_BYTES_MAX) => Ok(text),
        _ => refuse!(
            SlotLabel,
            "slot label {:?} is not 1 to 64 characters of a-z 0-9 . _ -",
            label.escape_ascii().to_string()
        ),
    }
}

fn check_body(kind: SlotKind, body: &[u8]) -> Result<()> {
    match kind {
        SlotKind::Raw
        | SlotKind::Scrypt
        | SlotKind::Argon2id
        | SlotKind::VaultKv
        | SlotKind::HpkeX25519
        | SlotKind::Pbkdf2Sha512 => {
            if body.len() != SLOT_WRAP_LEN {
                refuse!(SlotBody, "{} slot has a body of {} bytes, not {SLOT_WRAP_LEN}", kind.name(), body.len());
            }
        }
        SlotKind::VaultTransit => {
            if body.len() > SLOT_TRANSIT_BYTES_MAX || !is_transit_text(body) {
                refuse!(SlotBody, "vault-transit slot does not hold vault:vN:BASE64 of at most 512 bytes");
            }
        }
        SlotKind::Unknown(_) => {}
    }
    Ok(())
}

/// `vault:v<number without leading zero>:<base64>`.
fn is_transit_text(body: &[u8]) -> bool {
    let Some(rest) = body.strip_prefix(b"vault:v") else { return false };
    let digits = rest.iter().take_while(|c| c.is_ascii_digit()).count();
    let Some(payload) = rest[digits..].strip_prefix(b":") else { return false };
    (1..=10).contains(&digits)
        && rest[0] != b'0'
        && !payload.is_empty()
        && payload.iter().all(|c| c.is_ascii_alphanumeric() || b"+/=".contains(c))
}

/// One generation of the slots of one version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slots {
    /// From 1; a higher one replaces a lower one.
    pub generation: u32,
    pub model_id: ModelId,
    pub vid: Vid,
    /// For a quick no; the signed manifest's is the one that counts.
    pub dek_commit: [u8; 32],
    pub slots: Vec<Slot>,
}

impl Slots {
    /// # Errors
    /// The code of the rule that a slot breaks: what is written is what a reader accepts.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut table = Vec::new();
        for slot in &self.slots {
            slot.encode_into(&mut table);
        }
        let mut out = vec![0u8; SLOTS_HEADER_LEN];
        put(&mut out, 0, MAGIC);
        put(&mut out, 8, &FORMAT_VERSION.to_le_bytes());
        put(&mut out, 10, &u16::try_from(self.slots.len()).unwrap_or(u16::MAX).to_le_bytes());
        put(&mut out, 12, &self.generation.to_le_bytes());
        put(&mut out, 16, &self.model_id.0);
        put(&mut out, 48, &self.vid.0);
        put(&mut out, 64, &self.dek_commit);
        put(&mut out, 96, &u32::try_from(table.len()).unwrap_or(u32::MAX).to_le_bytes());
        out.extend(table);
        out.extend(sha256(&[&out]));
        Slots::parse(&out)?;
        Ok(out)
    }

    /// # Errors
    /// `SLOTS_LIMIT` (too long, 0 or more than 16 slots, a field too long), `SLOTS_FORMAT` (shape), `SLOTS_CHECKSUM`,
    /// `UNSUPPORTED` (version), `SLOT_LABEL`, `SLOT_PARAMS`, `SLOT_BODY`.
    pub fn parse(bytes: &[u8]) -> Result<Slots> {
        if bytes.len() > SLOTS_BYTES_MAX {
            refuse!(SlotsLimit, "slots object is {} bytes long, at most 64 KiB are allowed", bytes.len());
        }
        if bytes.len() < SLOTS_HEADER_LEN + CHECKSUM_LEN {
            refuse!(SlotsFormat, "slots object is only {} bytes long", bytes.len());
        }
        if &bytes[..8] != MAGIC {
            refuse!(SlotsFormat, "slots object does not start with MFS1SLOT");
        }
        let version = u16_at(bytes, 8);
        if version != FORMAT_VERSION {
            refuse!(Unsupported, "slots object has format version {version}, this reader knows {FORMAT_VERSION}");
        }
        let n_slots = usize::from(u16_at(bytes, 10));
        if !(1..=SLOTS_MAX).contains(&n_slots) {
            refuse!(SlotsLimit, "slots object has {n_slots} slots, 1 to {SLOTS_MAX} are allowed");
        }
        let (signed, checksum) = bytes.split_at(bytes.len() - CHECKSUM_LEN);
        let mut table = &signed[SLOTS_HEADER_LEN..];
        let slots_len = u32_at(bytes, 96);
        if slots_len as usize != table.len() {
            refuse!(SlotsFormat, "slots object says {slots_len} bytes of slots and has {}", table.len());
        }
        if sha256(&[signed]) != checksum {
            refuse!(SlotsChecksum, "slots object does not match its checksum: cut, or damaged on the way");
        }
        if !is_zero(&bytes[100..SLOTS_HEADER_LEN]) {
            refuse!(SlotsFormat, "slots object has a reserved byte set");
        }
        let generation = u32_at(bytes, 12);
        if generation == 0 {
            refuse!(SlotsFormat, "slots object has generation 0, the first is 1");
        }
        let mut slots = Vec::with_capacity(n_slots);
        for _ in 0..n_slots {
            let (slot, rest) = Slot::parse(table)?;
            slots.push(slot);
            table = rest;
        }
        if !table.is_empty() {
            refuse!(SlotsFormat, "slots object has {} bytes after its last slot", table.len());
        }
        Ok(Slots {
            generation,
            model_id: ModelId(array_at(bytes, 16)),
            vid: Vid(array_at(bytes, 48)),
            dek_commit: array_at(bytes, 64),
            slots,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    fn slot(params: SlotParams) -> Slot {
        let body = match params.kind() {
            SlotKind::VaultTransit => b"vault:v12:AAAA+/==".to_vec(),
            SlotKind::Unknown(_) => vec![1, 2, 3],
            _ => vec![5; 80],
        };
        Slot { label: "node-kek.2026_1".into(), params, body }
    }

    fn every_kind() -> Vec<Slot> {
        let salt = [9; 32];
        [
            SlotParams::Raw { salt },
            SlotParams::Scrypt { log2_n: 17, salt },
            SlotParams::Argon2id { m_kib: 262_144, t: 3, p: 4, salt },
            SlotParams::VaultKv { version: 1, salt },
            SlotParams::VaultTransit,
            SlotParams::HpkeX25519 { recipient: KeyId([8; 32]) },
            SlotParams::Pbkdf2Sha512 { iterations: 600_000, salt },
            SlotParams::Unknown { kind: 7, params: vec![1; 7] },
        ]
        .map(slot)
        .into()
    }

    fn slots(list: Vec<Slot>) -> Slots {
        Slots { generation: 3, model_id: ModelId([1; 32]), vid: Vid([2; 16]), dek_commit: [3; 32], slots: list }
    }

    /// Encodes past the writer's own check, so that wrong slots reach the reader.
    fn encoded(list: &[Slot]) -> Vec<u8> {
        let mut good = slots(vec![slot(SlotParams::VaultTransit)]).encode().unwrap();
        good.truncate(SLOTS_HEADER_LEN);
        for one in list {
            one.encode_into(&mut good);
        }
        let len = (good.len() - SLOTS_HEADER_LEN) as u32;
        put(&mut good, 10, &(list.len() as u16).to_le_bytes());
        put(&mut good, 96, &len.to_le_bytes());
        good.extend([0; 32]);
        reseal(good)
    }

    fn reseal(mut bytes: Vec<u8>) -> Vec<u8> {
        let at = bytes.len() - 32;
        let sum = sha256(&[&bytes[..at]]);
        put(&mut bytes, at, &sum);
        bytes
    }

    fn code(bytes: &[u8]) -> Code {
        Slots::parse(bytes).unwrap_err().code()
    }

    #[test]
    fn slots_of_every_kind_are_read_back_as_written() {
        let all = slots(every_kind());
        let bytes = all.encode().unwrap();
        assert_eq!(Slots::parse(&bytes).unwrap(), all);
        assert_eq!(encoded(&every_kind()), bytes);
    }

    #[test]
    fn sixteen_slots_are_read_and_seventeen_refused() {
        let many = |n| vec![slot(SlotParams::Raw { salt: [0; 32] }); n];
        Slots::parse(&encoded(&many(16))).unwrap();
        assert_eq!(code(&encoded(&many(17))), Code::SlotsLimit);
        assert_eq!(code(&encoded(&many(0))), Code::SlotsLimit);
        assert_eq!(slots(many(17)).encode().unwrap_err().code(), Code::SlotsLimit);
    }

    /// THREAT_MODEL (f) row 34.
    #[test]
    fn the_shape_of_a_slots_object_is_checked() {
        let good = encoded(&every_kind());
        for cut in [0, 1, 127, 159, good.len() - 1] {
            assert_eq!(code(&good[..cut]), Code::SlotsFormat, "{cut}");
        }
        let mut longer = good.clone();
        longer.push(0);
        assert_eq!(code(&longer), Code::SlotsFormat);
        assert_eq!(code(&vec![0; (64 << 10) + 1]), Code::SlotsLimit);
        let cases: &[(usize, &[u8], Code)] = &[
            (0, b"m", Code::SlotsFormat),
            (8, &[2], Code::Unsupported),
            (10, &[5], Code::SlotsFormat),
            (10, &[9], Code::SlotsFormat),
            (12, &[0; 4], Code::SlotsFormat),
            (96, &[0xff; 4], Code::SlotsFormat),
            (100, &[1], Code::SlotsFormat),
            (127, &[1], Code::SlotsFormat),
            (130, &[0, 0], Code::SlotLabel),
            (130, &[65, 0], Code::SlotLabel),
            (132, &[1, 1], Code::SlotsLimit),
            (134, &[0xff, 0xff], Code::SlotsLimit),
        ];
        for (at, bytes, want) in cases {
            let mut wrong = good.clone();
            put(&mut wrong, *at, bytes);
            assert_eq!(code(&reseal(wrong.clone())), *want, "offset {at} {bytes:?}");
        }
        let mut flipped = good.clone();
        flipped[140] ^= 1;
        assert_eq!(code(&flipped), Code::SlotsChecksum);
    }

    /// THREAT_MODEL (f) row 37.
    #[test]
    fn labels_that_could_be_paths_or_urls_are_refused() {
        let long = "x".repeat(65);
        for label in ["", "../../etc/shadow", "http://evil", "Upper", "a b", "a\n", "ä", &long] {
            let mut wrong = slot(SlotParams::Raw { salt: [0; 32] });
            wrong.label = label.into();
            assert_eq!(code(&encoded(&[wrong])), Code::SlotLabel, "{label:?}");
        }
    }

    /// THREAT_MODEL (f) row 36: refused by looking, so nothing was run.
    #[test]
    fn costs_out_of_bounds_are_refused() {
        let salt = [0; 32];
        for log2_n in [0, 14, 21, 40, 255] {
            assert_eq!(code(&encoded(&[slot(SlotParams::Scrypt { log2_n, salt })])), Code::SlotParams);
        }
        for (m_kib, t, p) in [
            (19_455, 3, 4),
            ((1 << 21) + 1, 3, 4),
            (u32::MAX, 3, 4),
            (262_144, 0, 4),
            (262_144, 11, 4),
            (262_144, u32::MAX, 4),
            (262_144, 3, 0),
            (262_144, 3, 17),
        ] {
            let wrong = slot(SlotParams::Argon2id { m_kib, t, p, salt });
            assert_eq!(code(&encoded(&[wrong])), Code::SlotParams, "{m_kib} {t} {p}");
        }
        assert_eq!(code(&encoded(&[slot(SlotParams::VaultKv { version: 0, salt })])), Code::SlotParams);
        for iterations in [0, 1, 99_999, 10_000_001, u32::MAX] {
            let wrong = slot(SlotParams::Pbkdf2Sha512 { iterations, salt });
            assert_eq!(code(&encoded(&[wrong])), Code::SlotParams, "{iterations}");
        }
        for iterations in [100_000, 10_000_000] {
            Slots::parse(&encoded(&[slot(SlotParams::Pbkdf2Sha512 { iterations, salt })])).unwrap();
        }
        for log2_n in [15, 20] {
            Slots::parse(&encoded(&[slot(SlotParams::Scrypt { log2_n, salt })])).unwrap();
        }
        Slots::parse(&encoded(&[slot(SlotParams::Argon2id { m_kib: 19_456, t: 10, p: 16, salt })])).unwrap();
    }

    #[test]
    fn parameters_of_another_length_are_refused() {
        for kind in [1, 2, 3, 4, 5, 6, 8] {
            let body = if kind == 5 { b"vault:v1:AA==".to_vec() } else { vec![0; 80] };
            let wrong = Slot { label: "x".into(), params: SlotParams::Unknown { kind, params: vec![16; 31] }, body };
            assert_eq!(code(&encoded(&[wrong])), Code::SlotParams, "kind {kind}");
        }
    }

    /// THREAT_MODEL (f) row 39.
    #[test]
    fn bodies_that_are_no_wrap_and_no_transit_text_are_refused() {
        for len in [0, 79, 81, 1024] {
            for params in [SlotParams::Raw { salt: [0; 32] }, SlotParams::HpkeX25519 { recipient: KeyId([0; 32]) }] {
                let mut wrong = slot(params);
                wrong.body = vec![0; len];
                assert_eq!(code(&encoded(&[wrong])), Code::SlotBody, "{len}");
            }
        }
        let long = format!("vault:v1:{}", "A".repeat(504));
        for text in [
            "",
            "vault:",
            "vault:v1",
            "vault:v1:",
            "vault:v:AA",
            "vault:v0:AA",
            "vault:v01:AA",
            "Vault:v1:AA",
            "vault:v1:A\nA",
            "vault:v1:A\0",
            "vault:v1:A:B",
            &long,
        ] {
            let mut wrong = slot(SlotParams::VaultTransit);
            wrong.body = text.into();
            assert_eq!(code(&encoded(&[wrong])), Code::SlotBody, "{text:?}");
        }
        let mut longest = slot(SlotParams::VaultTransit);
        longest.body = long[..512].into();
        Slots::parse(&encoded(&[longest])).unwrap();
    }

    #[test]
    fn the_wrap_context_starts_with_the_slot_as_stored() {
        let one = slot(SlotParams::Raw { salt: [9; 32] });
        let mut stored = Vec::new();
        one.encode_into(&mut stored);
        let context = Slot::wrap_context(&one.label, &one.params, ModelId([1; 32]), Vid([2; 16]), &[3; 32]);
        let head = stored.len() - 80;
        assert_eq!(context[..head], stored[..head]);
        assert_eq!(context.len(), head + 32 + 16 + 32);
    }
}

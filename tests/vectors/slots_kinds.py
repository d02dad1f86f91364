#!/usr/bin/env python3
"""Prints slots-kinds.hex: a slots object with a slot of type 6 and one of type 8, made from docs/FORMAT.md alone.

HPKE is written out from RFC 9180 over X25519, HMAC-SHA256 and AES-GCM of `cryptography`, because its own HPKE takes no
ephemeral key; that one then opens what was made. PBKDF2 is `hashlib`'s. Needs cryptography 47 or later.
"""

import hashlib
import hmac
import struct

from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM


def det(n, name):
    return hashlib.shake_256(name.encode()).digest(n)


def sha256(data):
    return hashlib.sha256(data).digest()


# --- RFC 9180, base mode, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM

KEM = b"KEM" + struct.pack(">H", 0x0020)
SUITE = b"HPKE" + struct.pack(">HHH", 0x0020, 0x0001, 0x0002)


def extract(salt, ikm):
    return hmac.new(salt or bytes(32), ikm, hashlib.sha256).digest()


def expand(prk, info, length):
    out, block = b"", b""
    for i in range(1, -(-length // 32) + 1):
        block = hmac.new(prk, block + info + bytes([i]), hashlib.sha256).digest()
        out += block
    return out[:length]


def labeled_extract(suite, salt, label, ikm):
    return extract(salt, b"HPKE-v1" + suite + label + ikm)


def labeled_expand(suite, prk, label, info, length):
    return expand(prk, struct.pack(">H", length) + b"HPKE-v1" + suite + label + info, length)


def private(seed):
    return X25519PrivateKey.from_private_bytes(seed)


def public(key):
    return key.public_key().public_bytes_raw()


def derive_key_pair(ikm):
    prk = labeled_extract(KEM, b"", b"dkp_prk", ikm)
    return private(labeled_expand(KEM, prk, b"sk", b"", 32))


def seal_base(recipient, info, plaintext, ikm):
    ephemeral = derive_key_pair(ikm)
    enc = public(ephemeral)
    shared = ephemeral.exchange(recipient.public_key())
    prk = labeled_extract(KEM, b"", b"eae_prk", shared)
    secret = labeled_expand(KEM, prk, b"shared_secret", enc + public(recipient), 32)
    context = b"\0" + labeled_extract(SUITE, b"", b"psk_id_hash", b"") + labeled_extract(SUITE, b"", b"info_hash", info)
    prk = labeled_extract(SUITE, secret, b"secret", b"")
    key = labeled_expand(SUITE, prk, b"key", context, 32)
    nonce = labeled_expand(SUITE, prk, b"base_nonce", context, 12)
    return enc + AESGCM(key).encrypt(nonce, plaintext, b"")


# --- docs/FORMAT.md


def X(prk, label, context, n):
    out, block = b"", b""
    for i in range(1, -(-n // 64) + 1):
        block = hmac.new(prk, block + b"MFS1/" + label + b"\0" + context + bytes([i]), hashlib.sha512).digest()
        out += block
    return out[:n]


DEK, VID = det(32, "dek"), det(16, "vid")
MODEL_ID = sha256(b"MFS1/model\0" + b"acme/llama-70b")
DEK_COMMIT = X(DEK, b"dek-commit", struct.pack("<H", 1) + MODEL_ID + VID, 32)


def head(kind, label, params):
    return struct.pack("<HHHH", kind, len(label), len(params), 80) + label + params


def hpke_slot(label, seed, ikm):
    recipient = private(seed)
    start = head(6, label, sha256(public(recipient)))
    info = b"MFS1/hpke\0" + start + MODEL_ID + VID + DEK_COMMIT
    body = seal_base(recipient, info, DEK, ikm)
    suite = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
    assert suite.decrypt(body, recipient, info) == DEK
    return start + body


def pbkdf2_slot(label, passphrase, iterations, salt):
    start = head(8, label, struct.pack("<I", iterations) + salt)
    kek = hashlib.pbkdf2_hmac("sha512", passphrase, b"MFS1/pbkdf2\0" + salt, iterations, 32)
    okm = X(kek, b"slot-wrap", start + MODEL_ID + VID + DEK_COMMIT, 32 + 12 + 32)
    return start + okm[44:] + AESGCM(okm[:32]).encrypt(okm[32:44], DEK, b"")


def slots_object(generation, slots):
    table = b"".join(slots)
    start = b"MFS1SLOT" + struct.pack("<HHI", 1, len(slots), generation) + MODEL_ID + VID + DEK_COMMIT
    out = start + struct.pack("<I", len(table)) + bytes(28) + table
    return out + sha256(out)


if __name__ == "__main__":
    made = slots_object(
        4,
        [
            hpke_slot(b"server-2026", det(32, "recipient"), det(32, "ephemeral")),
            pbkdf2_slot(b"old-passphrase", b"correct horse battery staple", 100_000, det(32, "psalt")),
        ],
    )
    for at in range(0, len(made), 64):
        print(made[at : at + 64].hex())

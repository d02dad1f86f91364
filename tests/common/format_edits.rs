//! Edits of the vectors of docs/FORMAT.md a.9, each with the code it must be refused with. Written to
//! tests/vectors/hostile.txt, from where any reader can take them; see the README there.

use std::fmt::Write;

/// What is edited, and what is made right again afterwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// 128 bytes of object 0.
    ObjectHeader,
    /// The whole sealed manifest; nothing is repaired.
    Manifest,
    /// 256 bytes; the body is sealed again under the edited header, commitments stay.
    Header,
    /// The plaintext body; lengths, commitments and tags are made again.
    Body,
    /// As `Body`; then chunk 0 of object 0 is opened.
    BodyThenChunk,
    /// The checksum is made again.
    Slots,
    /// It is not.
    SlotsRaw,
    /// Slots of a public key and of PBKDF2; the checksum is made again, then the recipient's secret half opens.
    SlotsHpke,
    /// The same; then the passphrase opens.
    SlotsPbkdf2,
    Ref,
    Signature,
    /// Stored chunk 0 of object 0, strict.
    Chunk,
    /// The same, chunk hash not asked for.
    ChunkAead,
}

const PARTS: [(&str, Part); 13] = [
    ("object-header", Part::ObjectHeader),
    ("manifest", Part::Manifest),
    ("manifest-header", Part::Header),
    ("manifest-body", Part::Body),
    ("manifest-body+chunk", Part::BodyThenChunk),
    ("slots", Part::Slots),
    ("slots-raw", Part::SlotsRaw),
    ("slots-hpke", Part::SlotsHpke),
    ("slots-pbkdf2", Part::SlotsPbkdf2),
    ("ref", Part::Ref),
    ("signature", Part::Signature),
    ("chunk", Part::Chunk),
    ("chunk-aead", Part::ChunkAead),
];

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Edit {
    Put(usize, Vec<u8>),
    Insert(usize, Vec<u8>),
    Remove(usize, usize),
    Zero(usize, usize),
    Cut(usize),
    Append(Vec<u8>),
    Pad(usize),
}

pub struct Hostile {
    pub name: String,
    pub part: Part,
    /// The name of a code, or `ACCEPTED`.
    pub code: String,
    pub edits: Vec<Edit>,
}

pub fn print(all: &[Hostile]) -> String {
    let mut out = String::new();
    for Hostile { name, part, code, edits } in all {
        let part = PARTS.iter().find(|(_, known)| known == part).unwrap().0;
        let edits: Vec<String> = edits
            .iter()
            .map(|edit| match edit {
                Edit::Put(at, bytes) => format!("put {at} {}", hex::encode(bytes)),
                Edit::Insert(at, bytes) => format!("insert {at} {}", hex::encode(bytes)),
                Edit::Remove(at, len) => format!("remove {at} {len}"),
                Edit::Zero(at, len) => format!("zero {at} {len}"),
                Edit::Cut(len) => format!("cut {len}"),
                Edit::Pad(len) => format!("pad {len}"),
                Edit::Append(bytes) => format!("append {}", hex::encode(bytes)),
            })
            .collect();
        writeln!(out, "{code} | {part} | {} | {name}", edits.join("; ")).unwrap();
    }
    out
}

pub fn parse(text: &str) -> Vec<Hostile> {
    let number = |word: &str| word.parse::<usize>().unwrap();
    let line = |line: &str| {
        let [code, part, edits, name] = line.split(" | ").collect::<Vec<_>>().try_into().unwrap();
        let edits = edits.split("; ").map(|edit| match edit.split(' ').collect::<Vec<_>>()[..] {
            ["put", at, bytes] => Edit::Put(number(at), hex::decode(bytes).unwrap()),
            ["insert", at, bytes] => Edit::Insert(number(at), hex::decode(bytes).unwrap()),
            ["remove", at, len] => Edit::Remove(number(at), number(len)),
            ["zero", at, len] => Edit::Zero(number(at), number(len)),
            ["pad", len] => Edit::Pad(number(len)),
            ["cut", len] => Edit::Cut(number(len)),
            ["append", bytes] => Edit::Append(hex::decode(bytes).unwrap()),
            _ => panic!("{edit}"),
        });
        Hostile {
            name: name.into(),
            part: PARTS.iter().find(|(known, _)| *known == part).unwrap().1,
            code: code.into(),
            edits: edits.collect(),
        }
    };
    text.lines().map(line).collect()
}

// Where the tables of the body of a.9 lie: 4 files, 3 extents, 2 objects, 4 hashes, 42 bytes of paths, 15 of annotations.
const FILE: [usize; 4] = [64, 144, 224, 304];
const EXTENT: [usize; 3] = [384, 408, 432];
const OBJECT: [usize; 2] = [456, 584];
const HASH: usize = 712;
const STRINGS: usize = 840;
const ANNOTATIONS: usize = 882;
const BODY_LEN: usize = 897;

fn u16(number: u16) -> Vec<u8> {
    number.to_le_bytes().into()
}
fn u32(number: u32) -> Vec<u8> {
    number.to_le_bytes().into()
}
fn u64(number: u64) -> Vec<u8> {
    number.to_le_bytes().into()
}
fn put(at: usize, bytes: impl Into<Vec<u8>>) -> Edit {
    Edit::Put(at, bytes.into())
}

/// All cases, in the order of the file.
pub fn all() -> Vec<Hostile> {
    let mut all = Vec::new();
    for (part, cases) in [
        (Part::ObjectHeader, object_header()),
        (Part::Manifest, manifest()),
        (Part::Header, header()),
        (Part::Body, body_counts()),
        (Part::Body, body_files()),
        (Part::Body, body_extents()),
        (Part::Body, body_objects()),
        (Part::BodyThenChunk, chunks_of_other_manifests()),
        (Part::Slots, slots()),
        (Part::SlotsRaw, slots_raw()),
        (Part::SlotsHpke, slots_hpke()),
        (Part::SlotsPbkdf2, slots_pbkdf2()),
        (Part::Ref, refs()),
        (Part::Signature, signature()),
        (Part::Chunk, chunk()),
        (Part::ChunkAead, chunk_aead()),
    ] {
        for (code, name, edits) in cases {
            all.push(Hostile { name: name.into(), part, code: code.into(), edits });
        }
    }
    all
}

type Cases = Vec<(&'static str, &'static str, Vec<Edit>)>;

fn object_header() -> Cases {
    vec![
        ("HEADER", "object header: another magic", vec![put(0, *b"MFS2DATA")]),
        ("HEADER", "object header: cut", vec![Edit::Cut(127)]),
        ("UNSUPPORTED", "object header: version 2", vec![put(8, u16(2))]),
        ("UNSUPPORTED", "object header: suite 3", vec![put(10, u16(3))]),
        ("OBJECT", "object header: blocks of 2^11", vec![put(12, [11])]),
        ("OBJECT", "object header: blocks of 2^63", vec![put(12, [63])]),
        ("OBJECT", "object header: chunks of 2^40", vec![put(13, [40])]),
        ("ACCEPTED", "object header: coded", vec![put(14, u16(1))]),
        ("UNSUPPORTED", "object header: flag 2", vec![put(14, u16(2))]),
        ("UNSUPPORTED", "object header: coded and flag 2", vec![put(14, u16(3))]),
        ("UNSUPPORTED", "object header: reserved byte", vec![put(127, [1])]),
    ]
}

fn manifest() -> Cases {
    vec![
        ("MAN_FORMAT", "manifest: shorter than its header", vec![Edit::Cut(255)]),
        ("MAN_LENGTH", "manifest: one byte short", vec![Edit::Cut(1168)]),
        ("MAN_LENGTH", "manifest: one byte long", vec![Edit::Append(vec![0])]),
        ("DEK_COMMIT", "manifest: another DEK commitment", vec![put(128, [0; 32])]),
        ("COMMIT", "manifest: another commitment", vec![put(160, [0; 32])]),
        ("BODY_TAG", "manifest: all-zero body", vec![put(256, [0; 64])]),
        ("BODY_TAG", "manifest: all-zero tag", vec![put(1153, [0; 16])]),
        ("BODY_TAG", "manifest: another creation time", vec![put(72, u64(0))]),
        ("BODY_TAG", "manifest: another manifest before it", vec![put(192, [7; 32])]),
        ("COMMIT", "manifest: another number", vec![put(64, u64(8))]),
        ("COMMIT", "manifest: another salt", vec![put(96, [0; 32])]),
        ("DEK_COMMIT", "manifest: another model", vec![put(16, [0; 32])]),
        ("DEK_COMMIT", "manifest: another version", vec![put(48, [0; 16])]),
    ]
}

fn header() -> Cases {
    vec![
        ("MAN_FORMAT", "manifest header: another magic", vec![put(0, *b"MFS1DATA")]),
        ("UNSUPPORTED", "manifest header: version 0", vec![put(8, u16(0))]),
        ("UNSUPPORTED", "manifest header: version 257", vec![put(8, u16(257))]),
        ("UNSUPPORTED", "manifest header: suite 0", vec![put(10, u16(0))]),
        ("DEK_COMMIT", "manifest header: the other suite", vec![put(10, u16(2))]),
        ("UNSUPPORTED", "manifest header: hash 3", vec![put(12, u16(3))]),
        ("UNSUPPORTED", "manifest header: flag", vec![put(14, u16(1))]),
        ("MAN_FORMAT", "manifest header: number 0", vec![put(64, u64(0))]),
        ("MAN_LENGTH", "manifest header: body of 63 bytes", vec![put(80, u64(63)), put(88, u64(79))]),
        ("MAN_LENGTH", "manifest header: body of 2^63 bytes", vec![put(80, u64(1 << 63))]),
        ("MAN_LENGTH", "manifest header: body of 2^64-1 bytes", vec![put(80, [0xff; 16])]),
        ("MAN_LENGTH", "manifest header: body above 512 MiB", vec![put(80, u64((512 << 20) + 1))]),
        ("MAN_LENGTH", "manifest header: stored length that lies", vec![put(88, u64(914))]),
        ("UNSUPPORTED", "manifest header: reserved byte", vec![put(224, [1])]),
        ("UNSUPPORTED", "manifest header: last reserved byte", vec![put(255, [0x80])]),
    ]
}

fn body_counts() -> Cases {
    vec![
        ("ACCEPTED", "body: other annotations", vec![put(ANNOTATIONS, [b' '; 15])]),
        ("BODY_LENGTH", "body: one byte short", vec![Edit::Cut(BODY_LEN - 1)]),
        ("BODY_LENGTH", "body: one byte long", vec![Edit::Append(vec![0])]),
        ("BODY_LENGTH", "body: nothing but counts", vec![Edit::Cut(64)]),
        ("LIMIT", "body: 2^32-1 files", vec![put(0, [0xff; 4])]),
        ("LIMIT", "body: 1,000,001 files", vec![put(0, u32(1_000_001))]),
        ("LIMIT", "body: 2^32-1 objects", vec![put(4, [0xff; 4])]),
        ("LIMIT", "body: 2^32-1 extents", vec![put(8, [0xff; 4])]),
        ("LIMIT", "body: more inherited roots than objects", vec![put(12, u32(3))]),
        ("LIMIT", "body: 2^60 hashes", vec![put(16, u64(1 << 60))]),
        ("LIMIT", "body: 2^27+1 bytes of paths", vec![put(24, u32((1 << 27) + 1))]),
        ("LIMIT", "body: 2^20+1 bytes of annotations", vec![put(28, u32((1 << 20) + 1))]),
        ("LIMIT", "body: more coded chunks than chunks", vec![put(32, u64(5))]),
        ("BODY_LENGTH", "body: a coded length of no object", vec![put(32, u64(1)), Edit::Insert(STRINGS, u32(1))]),
        ("UNSUPPORTED", "body: reserved byte", vec![put(63, [1])]),
        ("BODY_LENGTH", "body: as many extents as may be, and no bytes", vec![put(8, u32(4_000_000))]),
        ("BODY_LENGTH", "body: a hash of no chunk", vec![put(16, u64(5)), Edit::Insert(STRINGS, vec![0; 32])]),
        ("BODY_LENGTH", "body: a hash too few", vec![put(16, u64(3)), Edit::Remove(HASH, 32)]),
        ("BODY_LENGTH", "body: an extent of no file", vec![put(8, u32(4)), Edit::Insert(OBJECT[0], vec![0; 24])]),
        ("BODY_LENGTH", "body: a path byte of no file", vec![put(24, u32(43)), Edit::Insert(ANNOTATIONS, vec![b'x'])]),
        ("OBJECT", "body: an inherited root of no object", vec![put(12, u32(1)), Edit::Insert(HASH, vec![0; 32])]),
    ]
}

fn body_files() -> Cases {
    vec![
        ("ACCEPTED", "file: executable", vec![put(FILE[0] + 6, u16(0o555))]),
        ("ACCEPTED", "file: the oldest time there is", vec![put(FILE[0] + 56, i64::MIN.to_le_bytes())]),
        ("ACCEPTED", "file: the newest time there is", vec![put(FILE[0] + 56, i64::MAX.to_le_bytes())]),
        ("ACCEPTED", "file: names as bytes, whatever they look like", vec![put(STRINGS + 9, "cönfig.jso".as_bytes())]),
        ("BODY_LENGTH", "file: path starts elsewhere", vec![put(FILE[1], u32(8))]),
        ("BODY_LENGTH", "file: path past the end", vec![put(FILE[3] + 4, u16(18))]),
        ("BODY_LENGTH", "file: extents start elsewhere", vec![put(FILE[1] + 48, u32(0))]),
        ("BODY_LENGTH", "file: 2^32-1 extents", vec![put(FILE[3] + 52, [0xff; 4])]),
        ("UNSUPPORTED", "file: reserved byte", vec![put(FILE[2] + 79, [1])]),
        ("MODE", "file: set-user-id", vec![put(FILE[0] + 6, u16(0o4755))]),
        ("MODE", "file: writable", vec![put(FILE[0] + 6, u16(0o666))]),
        ("MODE", "file: a symlink", vec![put(FILE[0] + 6, u16(0o120_444))]),
        ("MODE", "file: no mode", vec![put(FILE[0] + 6, u16(0))]),
        ("LIMIT", "file: 2^63 bytes", vec![put(FILE[0] + 8, u64(1 << 63))]),
        ("LIMIT", "file: 2^64-1 bytes", vec![put(FILE[0] + 8, [0xff; 8])]),
        ("LIMIT", "file: 2^44+1 bytes", vec![put(FILE[0] + 8, u64((1 << 44) + 1))]),
        ("EXTENT", "file: a byte more than its extents", vec![put(FILE[0] + 8, u64(197_609))]),
        ("EXTENT", "file: no bytes but an extent", vec![put(FILE[0] + 8, u64(0))]),
        ("EXTENT", "file: bytes but no extent", vec![put(FILE[2] + 8, u64(1))]),
        ("PATH", "path: empty", vec![put(FILE[0] + 4, u16(0))]),
        ("PATH", "path: 1,025 bytes", vec![put(FILE[0] + 4, u16(1_025))]),
        ("PATH", "path: ../x", vec![put(STRINGS, *b"../ne.bin")]),
        ("PATH", "path: from the root", vec![put(STRINGS, *b"/aone.bin")]),
        ("PATH", "path: slash at the end", vec![put(STRINGS, *b"a/one.bi/")]),
        ("PATH", "path: two slashes", vec![put(STRINGS, *b"a//ne.bin")]),
        ("PATH", "path: a dot", vec![put(STRINGS, *b"a/./e.bin")]),
        ("PATH", "path: dots at the end", vec![put(STRINGS, *b"aaaaaa/..")]),
        ("PATH", "path: NUL", vec![put(STRINGS + 3, [0])]),
        ("PATH", "path: newline", vec![put(STRINGS + 3, [b'\n'])]),
        ("PATH", "path: DEL", vec![put(STRINGS + 3, [0x7f])]),
        ("PATH", "path: a C1 control", vec![put(STRINGS + 3, [0xc2, 0x85])]),
        ("PATH", "path: backslash", vec![put(STRINGS + 3, [b'\\'])]),
        ("PATH", "path: no UTF-8", vec![put(STRINGS + 3, [0xff])]),
        ("PATH", "path: an overlong slash", vec![put(STRINGS + 3, [0xc0, 0xaf])]),
        ("PATH", "path: a surrogate", vec![put(STRINGS + 3, [0xed, 0xa0, 0x80])]),
        ("MANIFEST_ORDER", "path: out of order", vec![put(STRINGS, [b'z'])]),
        (
            "MANIFEST_ORDER",
            "path: twice the same",
            vec![
                put(FILE[1] + 4, u16(9)),
                put(FILE[2], u32(18)),
                put(FILE[2] + 4, u16(7)),
                put(STRINGS + 9, *b"a/one.binz"),
            ],
        ),
        (
            "MANIFEST_TREE",
            "path: a file and a folder",
            vec![
                put(STRINGS, *b"aa-config.jsa/empty.bin.x"),
                put(FILE[0] + 4, u16(1)),
                put(FILE[1], u32(1)),
                put(FILE[1] + 4, u16(11)),
                put(FILE[2], u32(12)),
                put(FILE[2] + 4, u16(13)),
            ],
        ),
    ]
}

fn body_extents() -> Cases {
    vec![
        ("EXTENT", "extent: an object that is not there", vec![put(EXTENT[0], u32(2))]),
        ("EXTENT", "extent: object 2^32-1", vec![put(EXTENT[0], [0xff; 4])]),
        ("UNSUPPORTED", "extent: reserved byte", vec![put(EXTENT[0] + 4, [1])]),
        ("EXTENT", "extent: not aligned", vec![put(EXTENT[1] + 8, u64(200_705))]),
        ("EXTENT", "extent: past the end", vec![put(EXTENT[1] + 8, u64(204_800))]),
        ("EXTENT", "extent: starts past the end", vec![put(EXTENT[1] + 8, u64(1 << 30))]),
        ("EXTENT", "extent: offset and length wrap", vec![put(EXTENT[1] + 8, u64(u64::MAX - 4_095))]),
        ("EXTENT", "extent: empty", vec![put(EXTENT[0] + 16, u64(0))]),
        ("EXTENT", "extent: 2^64-1 bytes", vec![put(EXTENT[0] + 16, [0xff; 8])]),
        ("EXTENT", "extent: over its neighbour", vec![put(EXTENT[1] + 8, u64(196_608))]),
        ("EXTENT", "extent: the same twice", vec![put(EXTENT[1] + 8, u64(0))]),
        (
            "OBJECT",
            "extent: leaves an object unused",
            vec![
                put(EXTENT[2], u32(0)),
                put(EXTENT[2] + 16, u64(1)),
                put(FILE[3] + 8, u64(1)),
                put(EXTENT[0] + 16, u64(190_000)),
                put(FILE[0] + 8, u64(190_000)),
                put(EXTENT[2] + 8, u64(192_512)),
            ],
        ),
    ]
}

fn body_objects() -> Cases {
    let at = OBJECT[0];
    vec![
        ("OBJECT", "object: an oid twice", vec![put(OBJECT[1], super::det(32, "oid0"))]),
        ("OBJECT", "object: no bytes", vec![put(at + 32, u64(0))]),
        ("OBJECT", "object: 2^62 bytes", vec![put(at + 32, u64(1 << 62))]),
        ("OBJECT", "object: 2^40+1 bytes", vec![put(at + 32, u64((1 << 40) + 1))]),
        ("OBJECT", "object: stored length that lies", vec![put(at + 40, u64(205_897))]),
        ("OBJECT", "object: blocks of 1 byte", vec![put(at + 48, [0])]),
        ("OBJECT", "object: blocks of 2^63", vec![put(at + 48, [63])]),
        ("OBJECT", "object: chunks of 2^19", vec![put(at + 49, [19])]),
        ("OBJECT", "object: chunks of 2^40", vec![put(at + 49, [40])]),
        ("OBJECT", "object: chunks of 2^255", vec![put(at + 49, [255])]),
        ("UNSUPPORTED", "object: suite 0", vec![put(at + 50, u16(0))]),
        ("UNSUPPORTED", "object: suite 3", vec![put(at + 50, u16(3))]),
        ("OBJECT", "object: key source 2", vec![put(at + 52, u32(2))]),
        ("OBJECT", "object: derived, with an index", vec![put(at + 56, u32(1))]),
        ("OBJECT", "object: inherited, with no root", vec![put(at + 52, u32(1))]),
        (
            "OBJECT",
            "object: inherited root out of range",
            vec![put(12, u32(1)), put(at + 52, u32(1)), put(at + 56, u32(1)), Edit::Insert(HASH, vec![0; 32])],
        ),
        (
            "OBJECT",
            "object: one root for two",
            vec![put(12, u32(1)), put(at + 52, u32(1)), put(OBJECT[1] + 52, u32(1)), Edit::Insert(HASH, vec![0; 32])],
        ),
        (
            "OBJECT",
            "object: roots in another order",
            vec![
                put(12, u32(2)),
                put(at + 52, u32(1)),
                put(at + 56, u32(1)),
                put(OBJECT[1] + 52, u32(1)),
                Edit::Insert(HASH, vec![0; 64]),
            ],
        ),
        ("UNSUPPORTED", "object: flag 2", vec![put(at + 60, u32(2))]),
        ("UNSUPPORTED", "object: coded and flag 2", vec![put(at + 60, u32(3))]),
        ("ACCEPTED", "object: coded, its chunk as it is", coded(205_704, 205_896)),
        ("ACCEPTED", "object: coded, its chunk shorter", coded(100_000, 100_160)),
        ("ACCEPTED", "object: coded, its chunk one byte", coded(1, 145)),
        ("OBJECT", "object: coded, its chunk empty", coded(0, 128)),
        ("OBJECT", "object: coded, its chunk longer than plain", coded(205_705, 205_897)),
        ("OBJECT", "object: coded, its chunk of 2^32-1", coded(u32::MAX, 128)),
        ("OBJECT", "object: coded, stored length of plain", coded(100_000, 205_896)),
        ("OBJECT", "object: coded, stored length one short", coded(100_000, 100_159)),
        ("BODY_LENGTH", "object: coded, no coded length", vec![put(at + 60, u32(1))]),
        (
            "BODY_LENGTH",
            "object: coded, its length elsewhere",
            [coded(100_000, 100_160), vec![put(at + 120, u64(1))]].concat(),
        ),
        (
            "BODY_LENGTH",
            "object: coded, a length too many",
            [coded(100_000, 100_160), vec![put(32, u64(2)), Edit::Insert(STRINGS + 4, u32(1))]].concat(),
        ),
        (
            "BODY_LENGTH",
            "object: coded, a length for three chunks",
            vec![put(32, u64(1)), Edit::Insert(STRINGS, u32(9)), put(OBJECT[1] + 60, u32(1))],
        ),
        ("BODY_LENGTH", "object: hashes start elsewhere", vec![put(at + 64, u64(1))]),
        ("BODY_LENGTH", "object: hashes of its neighbour", vec![put(OBJECT[1] + 64, u64(0))]),
        ("OBJECT", "object: first coded chunk, not coded", vec![put(at + 120, u64(1))]),
    ]
}

/// Object 0 told to be coded, its one chunk in `len` bytes.
fn coded(len: u32, stored_len: u64) -> Vec<Edit> {
    let at = OBJECT[0];
    vec![put(32, u64(1)), put(at + 40, u64(stored_len)), put(at + 60, u32(1)), Edit::Insert(STRINGS, u32(len))]
}

fn chunks_of_other_manifests() -> Cases {
    let at = OBJECT[0];
    vec![
        ("COMMIT", "object: the other suite", vec![put(at + 50, u16(2))]),
        ("COMMIT", "object: another origin", vec![put(at + 72, [0; 16])]),
        ("COMMIT", "object: another commitment", vec![put(at + 88, [0; 32])]),
        ("COMMIT", "object: another chunk size", vec![put(at + 49, [21])]),
        ("COMMIT", "object: coded, which it is not", coded(205_704, 205_896)),
        ("COMMIT", "object: coded, shorter than it is stored", coded(100_000, 100_160)),
        (
            "COMMIT",
            "object: another root",
            vec![put(12, u32(1)), put(at + 52, u32(1)), Edit::Insert(HASH, vec![7; 32])],
        ),
        ("CHUNK_HASH", "object: another chunk hash", vec![put(HASH, [0; 32])]),
    ]
}

fn slots() -> Cases {
    vec![
        ("ACCEPTED", "slots: of a later type", vec![put(128, u16(7))]),
        ("SLOTS_FORMAT", "slots: another magic", vec![put(0, *b"MFS1SL0T")]),
        ("UNSUPPORTED", "slots: version 2", vec![put(8, u16(2))]),
        ("SLOTS_LIMIT", "slots: none", vec![put(10, u16(0))]),
        ("SLOTS_LIMIT", "slots: seventeen", vec![put(10, u16(17))]),
        ("SLOTS_FORMAT", "slots: two said, one there", vec![put(10, u16(2))]),
        ("SLOTS_FORMAT", "slots: generation 0", vec![put(12, u32(0))]),
        ("SLOTS_FORMAT", "slots: length that lies", vec![put(96, u32(132))]),
        ("SLOTS_FORMAT", "slots: 2^32-1 bytes of slots", vec![put(96, [0xff; 4])]),
        ("SLOTS_FORMAT", "slots: reserved byte", vec![put(127, [1])]),
        ("SLOTS_FORMAT", "slots: a byte after the last", vec![put(96, u32(134)), Edit::Insert(261, vec![0])]),
        ("SLOTS_LIMIT", "slots: above 64 KiB", vec![Edit::Pad(65_536 - 292)]),
        ("SLOT_LABEL", "slot: no label", vec![put(130, u16(0))]),
        ("SLOT_LABEL", "slot: label of 65", vec![put(130, u16(65))]),
        ("SLOT_LABEL", "slot: label is a path", vec![put(136, *b"../etc/shadow")]),
        ("SLOT_LABEL", "slot: label is a URL", vec![put(136, *b"http://evil.x")]),
        ("SLOT_LABEL", "slot: label in upper case", vec![put(136, [b'N'])]),
        ("SLOT_LABEL", "slot: label with NUL", vec![put(140, [0])]),
        ("SLOTS_LIMIT", "slot: 257 bytes of parameters", vec![put(132, u16(257))]),
        ("SLOTS_LIMIT", "slot: body of 65,535", vec![put(134, u16(u16::MAX))]),
        ("SLOTS_FORMAT", "slot: body past the end", vec![put(134, u16(81))]),
        ("SLOT_PARAMS", "slot: salt too short", vec![put(132, u16(31)), put(134, u16(81))]),
        ("SLOT_BODY", "slot: wrap too short", vec![put(134, u16(79)), put(96, u32(132)), Edit::Remove(260, 1)]),
        ("SLOT_PARAMS", "slot: scrypt with the parameters of raw", vec![put(128, u16(2))]),
        (
            "SLOT_PARAMS",
            "slot: scrypt of 2^40",
            vec![put(128, u16(2)), put(132, u16(33)), put(96, u32(134)), Edit::Insert(149, vec![40])],
        ),
        (
            "SLOT_PARAMS",
            "slot: scrypt of 2^14",
            vec![put(128, u16(2)), put(132, u16(33)), put(96, u32(134)), Edit::Insert(149, vec![14])],
        ),
        (
            "ACCEPTED",
            "slot: scrypt of 2^17",
            vec![put(128, u16(2)), put(132, u16(33)), put(96, u32(134)), Edit::Insert(149, vec![17])],
        ),
        (
            "SLOT_PARAMS",
            "slot: argon2 without bounds",
            vec![put(128, u16(3)), put(132, u16(44)), put(96, u32(145)), Edit::Insert(149, vec![0xff; 12])],
        ),
        (
            "SLOT_PARAMS",
            "slot: argon2 without lanes",
            vec![
                put(128, u16(3)),
                put(132, u16(44)),
                put(96, u32(145)),
                Edit::Insert(149, [u32(262_144), u32(3), u32(0)].concat()),
            ],
        ),
        (
            "SLOT_PARAMS",
            "slot: vault-kv of any version",
            vec![put(128, u16(4)), put(132, u16(36)), put(96, u32(137)), Edit::Insert(149, u32(0))],
        ),
        (
            "SLOT_BODY",
            "slot: transit that is none",
            vec![put(128, u16(5)), put(132, u16(0)), put(96, u32(101)), Edit::Remove(149, 32)],
        ),
    ]
}

// Where the two slots of slots-kinds.hex lie: label 136, key id 147, enc 179, ciphertext 211, tag 243, 259 in all; then
// label 267, iterations 281, salt 285, wrap 317, 397 in all.
const HPKE_BODY: usize = 179;
const PBKDF2_BODY: usize = 317;

fn slots_hpke() -> Cases {
    let mut one = [0; 32];
    one[0] = 1;
    // A point of order eight, and -1 (order four), as u-coordinates.
    let eight = hex::decode("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800").unwrap();
    let mut minus_one = [0xff; 32];
    (minus_one[0], minus_one[31]) = (0xec, 0x7f);
    vec![
        ("ACCEPTED", "hpke: unchanged", vec![Edit::Pad(0)]),
        ("ACCEPTED", "hpke: another generation", vec![put(12, u32(9))]),
        ("NO_KEY", "hpke: another recipient", vec![put(147, [0; 32])]),
        ("SLOT_COMMIT", "hpke: another label", vec![put(136, [b'r'])]),
        ("SLOTS_MODEL", "hpke: another model", vec![put(16, [0; 32])]),
        ("SLOTS_MODEL", "hpke: another version", vec![put(48, [0; 16])]),
        ("DEK_COMMIT", "hpke: another commitment", vec![put(64, [0; 32])]),
        ("SLOT_BODY", "hpke: enc of zeros", vec![put(HPKE_BODY, [0; 32])]),
        ("SLOT_BODY", "hpke: enc of order one", vec![put(HPKE_BODY, one)]),
        ("SLOT_BODY", "hpke: enc of order four", vec![put(HPKE_BODY, minus_one)]),
        ("SLOT_BODY", "hpke: enc of order eight", vec![put(HPKE_BODY, eight)]),
        ("SLOT_COMMIT", "hpke: the same enc with its top bit set", vec![put(HPKE_BODY + 31, [0xd0])]),
        ("SLOT_COMMIT", "hpke: another enc", vec![put(HPKE_BODY, [9; 32])]),
        ("SLOT_COMMIT", "hpke: ciphertext changed", vec![put(HPKE_BODY + 32, [0])]),
        ("SLOT_COMMIT", "hpke: tag changed", vec![put(HPKE_BODY + 79, [0])]),
        ("SLOT_COMMIT", "hpke: nothing but zeros sealed", vec![put(HPKE_BODY + 32, [0; 48])]),
        ("SLOT_PARAMS", "hpke: key id too short", vec![put(132, u16(31)), put(134, u16(81))]),
        ("SLOT_BODY", "hpke: body too short", vec![put(134, u16(79)), put(96, u32(268)), Edit::Remove(258, 1)]),
        ("SLOT_BODY", "hpke: body too long", vec![put(134, u16(81)), put(96, u32(270)), Edit::Insert(259, vec![0])]),
        ("NO_KEY", "hpke: told to be a raw key", vec![put(128, u16(1))]),
    ]
}

fn slots_pbkdf2() -> Cases {
    vec![
        ("ACCEPTED", "pbkdf2: unchanged", vec![Edit::Pad(0)]),
        ("SLOT_PARAMS", "pbkdf2: no iterations", vec![put(281, u32(0))]),
        ("SLOT_PARAMS", "pbkdf2: 99,999 iterations", vec![put(281, u32(99_999))]),
        ("SLOT_PARAMS", "pbkdf2: 10,000,001 iterations", vec![put(281, u32(10_000_001))]),
        ("SLOT_PARAMS", "pbkdf2: 2^32-1 iterations", vec![put(281, [0xff; 4])]),
        ("SLOT_COMMIT", "pbkdf2: another iteration count", vec![put(281, u32(100_001))]),
        ("SLOT_COMMIT", "pbkdf2: another salt", vec![put(285, [0; 32])]),
        ("SLOT_COMMIT", "pbkdf2: another label", vec![put(267, [b'0'])]),
        ("SLOT_COMMIT", "pbkdf2: another commitment in the wrap", vec![put(PBKDF2_BODY, [0; 32])]),
        ("SLOT_BODY", "pbkdf2: ciphertext changed", vec![put(PBKDF2_BODY + 32, [0])]),
        ("SLOT_BODY", "pbkdf2: tag changed", vec![put(PBKDF2_BODY + 79, [0])]),
        ("SLOT_PARAMS", "pbkdf2: parameters of raw", vec![put(263, u16(32)), put(265, u16(84))]),
        ("SLOT_BODY", "pbkdf2: wrap too short", vec![put(265, u16(79)), put(96, u32(268)), Edit::Remove(396, 1)]),
    ]
}

fn slots_raw() -> Cases {
    vec![
        ("SLOTS_CHECKSUM", "slots: a flipped bit", vec![put(200, [0xee])]),
        ("SLOTS_CHECKSUM", "slots: another model", vec![put(16, [0; 32])]),
        ("SLOTS_FORMAT", "slots: cut by one", vec![Edit::Cut(292)]),
        ("SLOTS_FORMAT", "slots: cut to the header", vec![Edit::Cut(128)]),
        ("SLOTS_FORMAT", "slots: nothing", vec![Edit::Cut(0)]),
    ]
}

fn refs() -> Cases {
    vec![
        ("ACCEPTED", "ref: number 2^64-1", vec![put(80, [0xff; 8])]),
        ("REF_FORMAT", "ref: another magic", vec![put(7, [1])]),
        ("UNSUPPORTED", "ref: version 2", vec![put(8, u16(2))]),
        ("UNSUPPORTED", "ref: flag", vec![put(10, u16(1))]),
        ("REF_LENGTH", "ref: no signature", vec![put(12, u32(0)), Edit::Cut(256)]),
        ("REF_LENGTH", "ref: five signatures", vec![put(12, u32(5)), Edit::Pad(400)]),
        ("REF_LENGTH", "ref: 2^32-1 signatures", vec![put(12, [0xff; 4])]),
        ("REF_LENGTH", "ref: two said, one there", vec![put(12, u32(2))]),
        ("REF_LENGTH", "ref: one byte short", vec![Edit::Cut(355)]),
        ("REF_LENGTH", "ref: one byte long", vec![Edit::Append(vec![0])]),
        ("REF_LENGTH", "ref: nothing", vec![Edit::Cut(0)]),
        ("REF_FORMAT", "ref: number 0", vec![put(80, u64(0))]),
        ("REF_FORMAT", "ref: version number 0", vec![put(88, u64(0))]),
        ("REF_FORMAT", "ref: a manifest of 335 bytes", vec![put(128, u64(335))]),
        ("REF_FORMAT", "ref: a manifest of 2^64-1 bytes", vec![put(128, [0xff; 8])]),
        ("UNSUPPORTED", "ref: reserved byte", vec![put(172, [1])]),
        ("UNSUPPORTED", "ref: last reserved byte", vec![put(255, [1])]),
        ("UNSUPPORTED", "ref: another algorithm", vec![put(256, u16(2))]),
        ("UNSUPPORTED", "ref: reserved bytes of a signature", vec![put(258, u16(1))]),
    ]
}

fn signature() -> Cases {
    vec![
        ("MAN_SIG", "signature: all zero", vec![put(0, [0; 144])]),
        ("MAN_SIG", "signature: cut", vec![Edit::Cut(143)]),
        ("MAN_SIG", "signature: long", vec![Edit::Append(vec![0])]),
        ("UNSUPPORTED", "signature: version 2", vec![put(8, u16(2))]),
        ("UNSUPPORTED", "signature: another algorithm", vec![put(10, u16(2))]),
        ("UNSUPPORTED", "signature: reserved byte", vec![put(15, [1])]),
    ]
}

fn chunk() -> Cases {
    vec![
        ("CHUNK_HASH", "chunk: ciphertext changed", vec![put(70_000, [0; 8])]),
        ("CHUNK_HASH", "chunk: tag changed", vec![put(205_704, [0; 16])]),
        ("CHUNK_HASH", "chunk: a block of zeros", vec![Edit::Zero(65_536, 65_536)]),
        ("LENGTH", "chunk: one byte short", vec![Edit::Cut(205_767)]),
        ("LENGTH", "chunk: one byte long", vec![Edit::Append(vec![0])]),
        ("LENGTH", "chunk: nothing", vec![Edit::Cut(0)]),
        ("LENGTH", "chunk: the last block missing", vec![Edit::Remove(196_608, 9_096), Edit::Remove(196_656, 16)]),
    ]
}

fn chunk_aead() -> Cases {
    vec![
        ("ACCEPTED", "chunk by tag: unchanged", vec![Edit::Pad(0)]),
        ("TAG", "chunk by tag: ciphertext changed", vec![put(70_000, [0; 8])]),
        ("TAG", "chunk by tag: tag changed", vec![put(205_704, [0; 16])]),
        ("TAG", "chunk by tag: a block of zeros", vec![Edit::Zero(65_536, 65_536)]),
        ("LENGTH", "chunk by tag: one byte short", vec![Edit::Cut(205_767)]),
    ]
}

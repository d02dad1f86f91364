//! What `modelfs top` shows: which parts of a file are resident, and the view itself on a real mount, in a pipe and on a
//! terminal that is given back however it ends.

#[path = "common/fixture.rs"]
mod fixture;
#[path = "common/mounted.rs"]
mod mounted;
#[path = "common/program.rs"]
mod program;
#[path = "common/terminal.rs"]
mod terminal;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fixture::{Fixture, NAME, Random, Style};
use modelfs::cache::{Cache, CacheLimits, Model, ObjectKey};
use modelfs::control::{self, FileMap, FileRow, MapRequest};
use modelfs::crypto::Verify;
use modelfs::error::Code;
use modelfs::format::{ChunkIndex, names};
use modelfs::vfs::Shown;
use mounted::How;
use program::{Program, can_mount, is_mountpoint, run_ok};
use serde_json::Value;
use terminal::Terminal;

const CHUNK: usize = 1 << 20;

/// A cache and a model of three files: `big.bin` of seven chunks and a bit in two objects, two small ones in one pack.
struct Scene {
    runtime: tokio::runtime::Runtime,
    cache: Cache,
    model: Arc<Model>,
    fixture: Fixture,
}

impl Scene {
    fn new() -> Scene {
        let mut random = Random::announced("top");
        let files = vec![
            ("a.json".to_owned(), random.bytes(5000)),
            ("b.json".to_owned(), random.bytes(3000)),
            ("big.bin".to_owned(), random.bytes(7 * CHUNK + 100)),
        ];
        let style = Style { pack_below: CHUNK, slice: 4 * CHUNK, ..Style::default() };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        let fixture = runtime.block_on(Fixture::seal(files, style, &mut random));
        let model = fixture.model(fixture.store.clone(), Verify::Strict);
        // A refusal is shown for as long as it is remembered.
        let limits = CacheLimits { refusal_memory: Duration::from_secs(600), ..CacheLimits::default() };
        let (_fs, cache, runtime) = mounted::filesystem(How { limits, ..How::default() }, model.clone());
        Scene { runtime, cache, model, fixture }
    }

    fn ask(&self, request: &MapRequest) -> modelfs::error::Result<FileMap> {
        let shown = [Shown { model: self.model.clone(), current: true }];
        let told = control::map(&shown, &self.cache, request)?;
        Ok(serde_json::from_value(told).expect("a map"))
    }

    fn map(&self, cells: usize) -> Vec<FileRow> {
        self.ask(&MapRequest { model: None, from: 0, rows: 10, cells }).expect("told").rows
    }

    fn cells(&self, cells: usize) -> String {
        self.map(cells)[2].cells.clone()
    }

    /// Object and chunk number of a chunk of `big.bin`.
    fn chunk(&self, number: u32) -> (u32, ChunkIndex) {
        let file = &self.model.manifest.files()[2];
        let extents = self.model.manifest.extents(file);
        (extents[number as usize / 4].object, ChunkIndex(number % 4))
    }

    /// Reads a chunk as a reader does, and lets it go.
    fn read(&self, number: u32) -> modelfs::error::Result<()> {
        let (object, index) = self.chunk(number);
        let object = self.cache.object(&self.model, object, false);
        self.runtime.block_on(self.cache.pin(&object, index)).map(drop)
    }

    /// Looks until nothing counts as read a moment ago.
    fn settled(&self, cells: usize) -> String {
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            let seen = self.cells(cells);
            if !seen.contains('@') {
                return seen;
            }
            assert!(Instant::now() < deadline, "still {seen}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn a_map_shows_which_chunks_are_absent_read_and_resident_and_looking_fetches_nothing() {
    let scene = Scene::new();
    assert_eq!(scene.cells(100), "........");
    assert_eq!(scene.cache.telemetry().fetch_requests.get(), 0);

    scene.read(5).expect("read");
    assert_eq!(scene.cells(100), ".....@..");
    assert_eq!(scene.settled(100), ".....#..");
    scene.read(7).expect("read");
    scene.settled(100);

    let rows = scene.map(100);
    assert_eq!(rows[2].cells, ".....#.#");
    assert_eq!((rows[2].chunks, rows[2].cell_chunks), (8, 1));
    assert_eq!(rows[2].resident_bytes, (CHUNK + 100) as u64, "the last chunk is as long as it is");
    // Four cells of two chunks, one of all.
    assert_eq!(scene.cells(4), "..++");
    assert_eq!(scene.cells(1), "+");
    assert_eq!(scene.map(3)[2].cell_chunks, 3);
    for number in [0, 1, 2, 3, 4, 6] {
        scene.read(number).expect("read");
    }
    assert_eq!((scene.settled(100).as_str(), scene.cells(3).as_str()), ("########", "###"));
    assert_eq!(scene.cells(0), "#", "one cell at least");
}

#[test]
fn files_that_share_a_chunk_tell_only_their_own_bytes() {
    let scene = Scene::new();
    let pack = scene.model.manifest.extents(&scene.model.manifest.files()[0])[0].object;
    let object = scene.cache.object(&scene.model, pack, false);
    drop(scene.runtime.block_on(scene.cache.pin(&object, ChunkIndex(0))).expect("read"));
    let rows = scene.map(10);
    assert_eq!((rows[0].resident_bytes, rows[1].resident_bytes, rows[2].resident_bytes), (5000, 3000, 0));
    assert_eq!((rows[0].cells.len(), rows[1].cells.len()), (1, 1));
}

#[test]
fn a_chunk_that_was_refused_is_shown_as_refused() {
    let scene = Scene::new();
    let (object, index) = scene.chunk(6);
    let entry = &scene.model.manifest.objects()[object as usize];
    let name = names::data(scene.fixture.model_id, entry.oid);
    let mut bytes = scene.fixture.store.get(&name).expect("stored").to_vec();
    let at = scene.model.manifest.chunk_stored(object, index).start as usize;
    bytes[at] ^= 1;
    scene.fixture.store.put(&name, bytes);

    let error = scene.read(6).expect_err("tampered with");

    assert_eq!(error.class(), modelfs::error::Class::Tampered, "{error:?}");
    assert_eq!(scene.cells(100), "......!.");
    assert_eq!(scene.cells(2), ".!", "a refusal is seen however small the map is");
    assert_eq!(scene.map(100)[2].resident_bytes, 0);
}

#[test]
fn an_answer_is_bounded_whatever_is_asked_and_an_unknown_model_is_named() {
    let scene = Scene::new();
    let all = MapRequest { model: Some(NAME.into()), from: 0, rows: usize::MAX, cells: usize::MAX };
    let told = scene.ask(&all).expect("told");
    assert_eq!((told.files, told.rows.len(), told.rows[2].cells.len()), (3, 3, 8));
    let behind = scene.ask(&MapRequest { from: usize::MAX, ..all.clone() }).expect("told");
    assert_eq!((behind.files, behind.rows.len()), (3, 0));
    let by_number = MapRequest { model: Some(format!("{NAME}@1")), ..all.clone() };
    assert_eq!(scene.ask(&by_number).expect("told"), told);
    for name in ["acme/other", &format!("{NAME}@2")] {
        let error = scene.ask(&MapRequest { model: Some((*name).into()), ..all.clone() }).expect_err("unknown");
        assert_eq!(error.code(), Code::NotFound);
        assert!(error.chain().contains(name), "{error:?}");
    }
    // Nobody asked for an object by looking at it.
    assert!(scene.cache.resident_bytes(ObjectKey { model: 0, object: 0 }.model) == 0);
}

/// A store with one model: 40 MiB of weights in five chunks, and a small file.
fn ready(folder: &tempfile::TempDir) -> Program {
    let source = folder.path().join("source");
    std::fs::create_dir(&source).expect("mkdir");
    let weights: Vec<u8> = (0..40 << 20).map(|i: u64| i.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    std::fs::write(source.join("weights.bin"), weights).expect("write");
    std::fs::write(source.join("config.json"), "{}").expect("write");
    let program = Program::in_folder(folder.path());
    program.seal(&source, "acme/m");
    program
}

#[test]
fn a_frame_and_a_sample_of_a_real_mount_show_what_was_read_of_it() {
    if !can_mount() {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = ready(&folder);
    let mount = program.mount(&["--cache", "128MiB", "--open", "lazy"]);
    let weights = program.mountpoint().join("acme/m/weights.bin");
    let mut piece = vec![0; 4096];
    File::open(&weights).expect("open").read_exact_at(&mut piece, 17 << 20).expect("read");
    let top = |more: &[&str]| {
        let mut command = program.command(&["top"]);
        command.arg(program.mountpoint()).args(["--every", "100ms"]).args(more).env("TERM", "xterm-256color");
        command
    };
    let sample = |more: &[&str]| -> Value {
        serde_json::from_slice(&run_ok(top(more).arg("--json")).stdout).expect("one JSON document")
    };

    let told = sample(&["--file", "weights.bin"]);
    assert_eq!(told["file"]["path"], "weights.bin");
    assert_eq!(told["file"]["chunks"], 5);
    let cells = told["file"]["cells"].as_str().expect("cells").to_owned();
    assert!(matches!(cells.as_bytes(), [.., b'#' | b'@', _, _]), "the third chunk was read: {cells}");
    assert_eq!(told["status"]["models"][0]["name"], "acme/m");
    assert!(told["rates"]["seconds"].as_f64().expect("a time") >= 0.1, "{}", told["rates"]);

    drop(std::fs::read(&weights).expect("read"));
    let frame = run_ok(top(&["--once", "--size", "100x30", "--file", "weights.bin"]).env("LANG", "C.UTF-8"));
    let frame = String::from_utf8(frame.stdout).expect("UTF-8");
    let place = program.mountpoint().display().to_string();
    for part in
        [&place, "serving", "acme/m", "weights.bin", "40.0 MiB", "100 %", "5 chunks, each cell a chunk", "none seen"]
    {
        assert!(frame.contains(part), "`{part}` is not in\n{frame}");
    }
    assert!(!frame.contains('\u{1b}'), "a pipe got colours: {frame:?}");
    assert_eq!(frame.lines().count(), 30);

    let ascii = run_ok(&mut top(&["--once", "--size", "80x24", "--ascii"])).stdout;
    assert!(ascii.is_ascii());
    let loud = run_ok(&mut top(&["--once", "--color", "always"])).stdout;
    assert!(loud.contains(&0x1b));
    // Said to be unwanted by whoever runs it, asked for by nobody.
    assert!(!run_ok(top(&["--once"]).env("NO_COLOR", "1")).stdout.contains(&0x1b));

    for (more, code) in [
        (["--file", "nothing.bin"], 3),
        (["--model", "acme/other"], 3),
        (["--every", "1ms"], 2),
        (["--size", "0x0"], 2),
        (["--color", "mauve"], 2),
    ] {
        let ended = top(&more).arg("--once").output().expect("the binary runs");
        assert_eq!(ended.status.code(), Some(code), "{more:?}: {}", String::from_utf8_lossy(&ended.stderr));
    }
    let locked = run_ok(program.command(&["lock"]).arg(program.mountpoint()));
    drop(locked);
    let frame = run_ok(&mut top(&["--once"])).stdout;
    assert!(String::from_utf8_lossy(&frame).contains("locked"));
    mount.unmount();
    let ended = top(&["--once"]).output().expect("the binary runs");
    assert_eq!(ended.status.code(), Some(3), "{}", String::from_utf8_lossy(&ended.stderr));
}

/// `modelfs top` on a terminal of its own.
fn view(program: &Program) -> Terminal {
    let mut command = program.command(&["top"]);
    command.arg(program.mountpoint()).args(["--every", "200ms"]).env("LANG", "C.UTF-8");
    Terminal::start(&mut command)
}

/// Waits for the end, and for the terminal as a command finds it: cooked, and on its first screen.
fn ends(mut terminal: Terminal, code: i32) {
    let (ended, seen) = terminal.ended();
    assert_eq!(ended, Some(code), "{seen}");
    assert!(seen.contains("\u{1b}[?1049l"), "the first screen did not come back: {seen:?}");
    let flags = libc::ICANON | libc::ECHO | libc::ISIG;
    assert_eq!(terminal.modes().c_lflag & flags, flags, "the terminal is still raw");
}

#[test]
fn the_view_follows_keys_and_sizes_and_gives_the_terminal_back_however_it_ends() {
    if !can_mount() {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = ready(&folder);
    let mount = program.mount(&["--cache", "128MiB", "--open", "lazy"]);

    let mut by_key = view(&program);
    by_key.expect("\u{1b}[?1049h");
    by_key.expect("map of config.json");
    // The end of the first frame. From then on only cells that change are written: the title of the map, but for the last
    // letter, which both names have in the same place.
    by_key.expect("space stops");
    by_key.press("\u{1b}[B");
    by_key.expect("weights.bi");
    by_key.resize(60, 20);
    // Drawn anew as a whole, with the last line where it is now.
    by_key.expect("\u{1b}[20;1H");
    by_key.press(" ");
    by_key.expect("stopped");
    by_key.press("q");
    ends(by_key, 0);

    let mut by_interrupt = view(&program);
    by_interrupt.expect("config.json");
    by_interrupt.press("\u{3}");
    ends(by_interrupt, 0);

    let mut by_signal = view(&program);
    by_signal.expect("config.json");
    by_signal.signal(libc::SIGTERM);
    ends(by_signal, 0);

    let mut by_end_of_mount = view(&program);
    by_end_of_mount.expect("config.json");
    mount.unmount();
    assert!(!is_mountpoint(program.mountpoint()));
    ends(by_end_of_mount, 3);
}

//! `modelfs demo`: the program's main job, from end to end, with nothing to prepare.
//!
//! Runs this very program as a user would, command by command, so that what it shows is what there is.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::{Value, json};

use super::Out;
use crate::config::{CACHE_BYTES_MIN, default_cache_bytes};
use crate::control::code_named;
use crate::crypto::FileHasher;
use crate::error::{Code, Error, Result};
use crate::units::{show_rate, show_size};
use crate::{host, mem, refuse};

/// Seal a model (DIR, or a generated one) into a temporary store, mount it, read it back, compare, clean up.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct DemoArgs {
    /// A folder with a model in it [default: a generated model of 66 MiB]
    dir: Option<PathBuf>,
    /// Leave it mounted, and say how to look at it and how to stop it
    #[arg(long)]
    keep: bool,
}

const EXAMPLES: &str = "\
Examples:
  modelfs demo
  modelfs demo ~/models/llama-3-8b
  modelfs demo --keep

Needs root, or fuse3 and a memory limit (`ulimit -l`, in KiB) of half more than the model: 131072 holds the generated \
one. Needs as much free memory, and twice the size of the model on disk. Everything it makes lies in one temporary \
folder, which it removes again; the model in DIR is only read.";

const MODEL: &str = "demo/model";
/// Large enough to show a rate, small enough for any machine.
const TENSOR_BYTES: u64 = 64 << 20;
const READ_BYTES: usize = 1 << 20;

pub fn run(args: &DemoArgs, out: &Out) -> Result<()> {
    let work = Work::new()?;
    let source = match &args.dir {
        Some(dir) => dir.clone(),
        None => {
            let dir = work.path.join("plain");
            generate(&dir)?;
            dir
        }
    };
    let done = play(&work, &source, args, out);
    match (&done, args.keep) {
        (Ok(()), true) => work.keep(),
        _ => work.clean(),
    }
    done
}

fn play(work: &Work, source: &Path, args: &DemoArgs, out: &Out) -> Result<()> {
    let cache = cache_for(bytes_below(source)?);
    need_memory(cache)?;
    let cache = format!("{}MiB", cache >> 20);
    let (key, store, mnt) = (work.path.join("demo.key"), work.path.join("store"), work.path.join("mnt"));
    let signing = work.path.join("signing.key");
    for dir in [&store, &mnt] {
        make_dir(dir)?;
    }
    out.hint(format!("model      {}", source.display()));
    work.modelfs(&["keygen", text(&key)?])?;
    work.modelfs(&["keygen", "--signing", text(&signing)?])?;
    let key_spec = format!("file:{}", key.display());
    let sealed_from = Instant::now();
    let sealed =
        work.modelfs(&["seal", text(source)?, text(&store)?, MODEL, "--key", &key_spec, "--sign", text(&signing)?])?;
    let seal_took = sealed_from.elapsed();

    let mut public = signing.clone().into_os_string();
    public.push(".pub");
    let public = PathBuf::from(public);
    let mount_from = Instant::now();
    let mount = ["mount", text(&store)?, text(&mnt)?, "--key", &key_spec, "--trust", text(&public)?, "--daemon"];
    work.modelfs(&[&mount[..], &["--cache", &cache]].concat())?;
    work.mounted.set(true);
    let mount_took = mount_from.elapsed();

    let mut account = read_back(source, &mnt.join(MODEL))?;
    let status = work.modelfs(&["status", text(&mnt)?])?;
    account["seal_seconds"] = json!(seal_took.as_secs_f64());
    account["mount_seconds"] = json!(mount_took.as_secs_f64());
    account["sealed"] = sealed;
    account["status"] = status;
    account["kept"] = json!(args.keep);
    account["folder"] = json!(work.path);
    if !args.keep {
        work.modelfs(&["umount", text(&mnt)?])?;
        work.mounted.set(false);
    }
    out.result(&account, || tell(&account, &mnt, seal_took, args.keep))
}

/// Whole files are served past the daemon while they fit three quarters of the cache, so half more than the model; and
/// never more than a mount would take by itself.
fn cache_for(model_bytes: u64) -> u64 {
    let roomy = model_bytes.saturating_add(model_bytes / 2);
    roomy.min(default_cache_bytes()).max(CACHE_BYTES_MIN).next_multiple_of(1 << 20)
}

/// Asked before anything is sealed, as the mount will ask; what it would answer names ways that a user who only tries
/// the program does not have.
fn need_memory(cache_bytes: u64) -> Result<()> {
    let bytes = host::memory_bytes(cache_bytes);
    match mem::Arena::open(mem::ArenaPlan { bytes }) {
        Err(err) if err.code() == Code::Memlock => {
            // The mount locks its keys beside it.
            let limit = (bytes + (2 << 20)).next_multiple_of(1 << 20);
            let seen = mem::memlock_limit().map_or("of no use".to_owned(), |bytes| (bytes >> 10).to_string());
            refuse!(
                Memlock,
                "the demo locks {} of memory, which takes `ulimit -l {}` or more where it is not run as root; here it is \
                 {seen}. Raise it for this shell, then run the demo again: `sudo prlimit --pid $$ --memlock={limit}`",
                show_size(bytes),
                limit >> 10,
            )
        }
        other => other.map(drop),
    }
}

fn tell(account: &Value, mnt: &Path, seal_took: Duration, keep: bool) -> String {
    let number = |pointer: &str| account.pointer(pointer).and_then(Value::as_f64).unwrap_or_default();
    let bytes = number("/bytes") as u64;
    let rate = |seconds: f64| show_rate(bytes, Duration::from_secs_f64(seconds.max(1e-9)));
    let opens = |kind: &str| number(&format!("/status/metrics/opens_{kind}")) as u64;
    let mut text = format!(
        "sealed     {} in {} files, encrypted and signed at {}\n\
         mounted    in {:.2} s\n\
         first read {} through the kernel (fetched, verified and decrypted on the way)\n\
         read again {} from memory\n\
         compared   every file has the SHA-256 of its source\n\
         opens      {} answered with the locked pages themselves, {} copied\n",
        show_size(bytes),
        number("/files"),
        rate(seal_took.as_secs_f64()),
        number("/mount_seconds"),
        rate(number("/cold_seconds")),
        rate(number("/warm_seconds")),
        opens("passthrough"),
        opens("plain"),
    );
    let memory = account.pointer("/status/memory").and_then(Value::as_str).unwrap_or("locked memory, never on disk");
    text.push_str(&format!("plaintext  lives in {memory}; the store holds ciphertext only\n"));
    if keep {
        let mnt = mnt.display();
        text.push_str(&format!(
            "\nIt stays mounted. Look:  ls -lR {mnt}\n                         modelfs status {mnt}\n\
             Stop:                    modelfs umount {mnt} && rm -r {}\n",
            account["folder"].as_str().unwrap_or_default()
        ));
    } else {
        text.push_str("cleaned up: unmounted, keys and plaintext wiped, temporary files removed\n");
    }
    text
}

/// Reads every file of `source` and its twin below `mounted`, twice, and compares.
fn read_back(source: &Path, mounted: &Path) -> Result<Value> {
    let files = files_below(source)?;
    let mut sums = Vec::new();
    let mut bytes = 0u64;
    for file in &files {
        let (sum, len) = hash_file(&source.join(file))?;
        sums.push(sum);
        bytes += len;
    }
    let mut took = [0.0f64; 2];
    for seconds in &mut took {
        let from = Instant::now();
        for (file, want) in files.iter().zip(&sums) {
            let (got, _) = hash_file(&mounted.join(file))?;
            if got != *want {
                return Err(Error::new(
                    Code::FileHash,
                    format!("{} read through the mount is not what was sealed", file.display()),
                ));
            }
        }
        *seconds = from.elapsed().as_secs_f64();
    }
    Ok(json!({"files": files.len(), "bytes": bytes, "cold_seconds": took[0], "warm_seconds": took[1], "equal": true}))
}

fn hash_file(path: &Path) -> Result<([u8; 32], u64)> {
    let fault = |e| Error::new(Code::Host, format!("cannot read {}", path.display())).with_source(e);
    let mut file = File::open(path).map_err(fault)?;
    let mut hasher = FileHasher::new();
    let mut piece = vec![0; READ_BYTES];
    let mut len = 0;
    loop {
        match file.read(&mut piece).map_err(fault)? {
            0 => return Ok((hasher.finish(), len)),
            got => {
                hasher.update(&piece[..got]);
                len += got as u64;
            }
        }
    }
}

fn bytes_below(dir: &Path) -> Result<u64> {
    let mut bytes = 0u64;
    for file in files_below(dir)? {
        let path = dir.join(file);
        let fault = |e| Error::new(Code::Source, format!("cannot look at {}", path.display())).with_source(e);
        bytes = bytes.saturating_add(path.metadata().map_err(fault)?.len());
    }
    Ok(bytes)
}

/// Regular files, relative to `dir`, sorted: what `seal` takes.
fn files_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut open = vec![PathBuf::new()];
    while let Some(relative) = open.pop() {
        let here = dir.join(&relative);
        let fault = |e| Error::new(Code::Source, format!("cannot read the folder {}", here.display())).with_source(e);
        for entry in std::fs::read_dir(&here).map_err(fault)? {
            let entry = entry.map_err(fault)?;
            let name = relative.join(entry.file_name());
            let kind = entry.file_type().map_err(fault)?;
            if kind.is_dir() {
                open.push(name);
            } else if kind.is_file() {
                found.push(name);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// A small model as the usual tools write it: a valid safetensors file and its JSON companions.
fn generate(dir: &Path) -> Result<()> {
    make_dir(dir)?;
    let write = |name: &str, bytes: &[u8]| {
        std::fs::write(dir.join(name), bytes)
            .map_err(|e| Error::new(Code::Host, format!("cannot write {name} of the demo model")).with_source(e))
    };
    let config = json!({"architectures": ["DemoForCausalLM"], "hidden_size": 4096, "torch_dtype": "bfloat16"});
    write("config.json", config.to_string().as_bytes())?;
    let vocabulary: serde_json::Map<String, Value> = (0..20_000).map(|i| (format!("token{i}"), json!(i))).collect();
    write("tokenizer.json", json!({"model": {"type": "BPE", "vocab": vocabulary}}).to_string().as_bytes())?;
    write("README.md", b"# A generated model\n\nIts weights are noise.\n")?;

    let half = TENSOR_BYTES / 2;
    let mut header = json!({
        "embed.weight": {"dtype": "BF16", "shape": [half / 2 / 4096, 4096], "data_offsets": [0, half]},
        "lm_head.weight": {"dtype": "BF16", "shape": [half / 2 / 4096, 4096], "data_offsets": [half, TENSOR_BYTES]},
    })
    .to_string();
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    let name = "model.safetensors";
    let fault = |e| Error::new(Code::Host, format!("cannot write {name} of the demo model")).with_source(e);
    let mut file = std::io::BufWriter::new(File::create(dir.join(name)).map_err(fault)?);
    file.write_all(&(header.len() as u64).to_le_bytes()).map_err(fault)?;
    file.write_all(header.as_bytes()).map_err(fault)?;
    // xorshift64: as incompressible as weights, and the same each time.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut piece = vec![0u8; READ_BYTES];
    for _ in 0..TENSOR_BYTES / READ_BYTES as u64 {
        for word in piece.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        file.write_all(&piece).map_err(fault)?;
    }
    file.flush().map_err(fault)
}

fn make_dir(path: &Path) -> Result<()> {
    std::fs::DirBuilder::new()
        .mode(0o700)
        .create(path)
        .map_err(|e| Error::new(Code::Host, format!("cannot make the folder {}", path.display())).with_source(e))
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| Error::new(Code::Usage, format!("{} is not UTF-8", path.display())))
}

/// The demo's folder, and this program run with its state kept in there.
struct Work {
    path: PathBuf,
    program: PathBuf,
    mounted: std::cell::Cell<bool>,
}

impl Work {
    fn new() -> Result<Work> {
        // Mode 0700. Removed by `clean`, once nothing is mounted in it any more.
        let path = tempfile::Builder::new().prefix("modelfs-demo-").tempdir().map(tempfile::TempDir::keep);
        let path = path.map_err(|e| Error::new(Code::Host, "cannot make a temporary folder").with_source(e))?;
        let program = std::env::current_exe()
            .map_err(|e| Error::new(Code::Host, "cannot find this program's own file").with_source(e))?;
        Ok(Work { path, program, mounted: std::cell::Cell::new(false) })
    }

    /// Runs one command with `--json`; its result, or its error as it had it.
    fn modelfs(&self, args: &[&str]) -> Result<Value> {
        let done = Command::new(&self.program)
            .args(args)
            .arg("--json")
            .env("MODELFS_STATE_DIR", self.path.join("state"))
            .env_remove("MODELFS_KEY")
            .env_remove("MODEL_ENCRYPTION_KEY")
            .env_remove("MODELFS_CONFIG")
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .output()
            .map_err(|e| Error::new(Code::Host, format!("cannot run {}", self.program.display())).with_source(e))?;
        let value: Value = serde_json::from_slice(&done.stdout).unwrap_or(Value::Null);
        if done.status.success() {
            return Ok(value);
        }
        let code = value.pointer("/error/code").and_then(Value::as_str).map_or(Code::Host, code_named);
        let message = match value.pointer("/error/message").and_then(Value::as_str) {
            Some(message) => message.to_string(),
            None => String::from_utf8_lossy(&done.stderr).trim().to_string(),
        };
        Err(Error::new(code, message).context(format!("`modelfs {}` of the demo", args.first().unwrap_or(&""))))
    }

    fn keep(self) {}

    /// Best effort: a demo that failed must not leave a mount behind.
    fn clean(self) {
        let mnt = self.path.join("mnt");
        if self.mounted.get()
            && let Err(e) = self.modelfs(&["umount", &mnt.to_string_lossy()])
        {
            tracing::warn!("{} stays mounted: {}", mnt.display(), e.chain());
            return;
        }
        if let Err(e) = std::fs::remove_dir_all(&self.path) {
            tracing::warn!("{} stays: {e}", self.path.display());
        }
    }
}

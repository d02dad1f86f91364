//! What the NVIDIA driver says of the GPUs that this process can see.
//!
//! In: the driver's own library, loaded at run time. Out: [`Seen`], or the plain list of [`devices`].
//! Promises: without a GPU's device file nothing is loaded, and that is no error; the library is opened once; a driver
//! that does not answer costs [`WAIT`] once and nothing while it stays silent; no more than [`DEVICES_MAX`] are listed.
//! Not here: what a GPU costs or earns (`doctor`, the metrics).
//! Held by: the tests below, against a library of this interface that they build.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;
use serde::Serialize;

/// The name under which every driver of version 4 and later installs it.
const LIBRARY: &str = "libnvidia-ml.so.1";
/// One of them is there wherever a GPU can be used: the driver's own, and the one of Windows's Linux.
const DEVICES: [&str; 2] = ["/dev/nvidiactl", "/dev/dxg"];
/// A driver that is well answers within milliseconds; the first question to a GPU that sleeps takes a second or two.
pub const WAIT: Duration = Duration::from_secs(5);
/// Several who ask at once are told the same.
const FRESH: Duration = Duration::from_millis(500);
/// More than any one machine holds.
pub const DEVICES_MAX: u32 = 64;
/// Longest name or number that is repeated of what the driver says.
const SAID_CHARS_MAX: usize = 96;

/// One GPU. What it does not tell (shared memory, a slice of a GPU, an old driver) is `None`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Gpu {
    pub index: u32,
    pub uuid: String,
    pub name: String,
    /// Bytes.
    pub memory_total: Option<u64>,
    pub memory_used: Option<u64>,
    /// Of the last sampling period, 0 to 100.
    pub utilisation_percent: Option<u32>,
}

/// What asking came to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Seen {
    /// No device file of a GPU.
    #[default]
    Nothing,
    /// A device file, and no answer: why not.
    Silent(String),
    /// `lost`: GPUs of which the driver knows and cannot say more.
    Driver { version: String, gpus: Vec<Gpu>, lost: u32 },
}

/// The GPUs that answer; none where there is no driver.
pub fn devices() -> Vec<Gpu> {
    match look() {
        Seen::Driver { gpus, .. } => gpus,
        Seen::Nothing | Seen::Silent(_) => Vec::new(),
    }
}

/// Blocks for [`WAIT`] at most.
pub fn look() -> Seen {
    static DRIVER: LazyLock<Driver> = LazyLock::new(|| Driver::at(LIBRARY.into(), WAIT));
    match DEVICES.iter().any(|device| Path::new(device).exists()) {
        true => DRIVER.look(),
        false => Seen::Nothing,
    }
}

/// The library at one path, and the last answer.
struct Driver {
    library: PathBuf,
    wait: Duration,
    opened: Arc<Mutex<Option<Nvml>>>,
    last: Mutex<Option<(Instant, Seen)>>,
    /// A question that nobody waits for any more, and which has not ended.
    stuck: Arc<AtomicBool>,
}

impl Driver {
    fn at(library: PathBuf, wait: Duration) -> Driver {
        let opened = Arc::new(Mutex::new(None));
        Driver { library, wait, opened, last: Mutex::new(None), stuck: Arc::new(AtomicBool::new(false)) }
    }

    fn look(&self) -> Seen {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, seen)) = &*last
            && at.elapsed() < FRESH
        {
            return seen.clone();
        }
        let seen = self.ask();
        *last = Some((Instant::now(), seen.clone()));
        seen
    }

    /// In a thread of its own: a call into a driver that hangs cannot be ended.
    fn ask(&self) -> Seen {
        let silent = || Seen::Silent("the driver does not answer".into());
        if self.stuck.swap(true, Ordering::AcqRel) {
            return silent();
        }
        let (sender, answer) = mpsc::sync_channel(1);
        let (opened, stuck, library) = (self.opened.clone(), self.stuck.clone(), self.library.clone());
        let thread = std::thread::Builder::new().name("gpu".into()).spawn(move || {
            let seen = question(&mut opened.lock().unwrap_or_else(PoisonError::into_inner), &library);
            stuck.store(false, Ordering::Release);
            // Nobody waits any more: the next question learns it.
            let _ = sender.send(seen);
        });
        match thread {
            Ok(_) => answer.recv_timeout(self.wait).unwrap_or_else(|_| silent()),
            Err(error) => {
                self.stuck.store(false, Ordering::Release);
                Seen::Silent(format!("cannot start a thread: {error}"))
            }
        }
    }
}

fn question(opened: &mut Option<Nvml>, library: &Path) -> Seen {
    let nvml = match opened {
        Some(nvml) => nvml,
        None => match Nvml::builder().lib_path(library.as_os_str()).init() {
            Ok(nvml) => opened.insert(nvml),
            Err(NvmlError::LibloadingError(_)) => {
                return Seen::Silent(format!("the driver's library {} cannot be loaded", library.display()));
            }
            Err(error) => return Seen::Silent(plain(&error.to_string())),
        },
    };
    let count = match nvml.device_count() {
        Ok(count) => count.min(DEVICES_MAX),
        Err(error) => return Seen::Silent(plain(&error.to_string())),
    };
    let gpus: Vec<Gpu> = (0..count).filter_map(|index| gpu(nvml, index).ok()).collect();
    let lost = count - u32::try_from(gpus.len()).expect("one of each index at most");
    Seen::Driver { version: nvml.sys_driver_version().map_or_else(|_| "unknown".into(), |v| plain(&v)), gpus, lost }
}

/// # Errors
/// The driver's own, when it cannot even name the device: it fell off the bus, or is not for this process.
fn gpu(nvml: &Nvml, index: u32) -> Result<Gpu, NvmlError> {
    let device = nvml.device_by_index(index)?;
    let memory = device.memory_info().ok();
    Ok(Gpu {
        index,
        uuid: plain(&device.uuid()?),
        name: plain(&device.name()?),
        memory_total: memory.as_ref().map(|memory| memory.total),
        memory_used: memory.as_ref().map(|memory| memory.used),
        utilisation_percent: device.utilization_rates().ok().map(|rates| rates.gpu.min(100)),
    })
}

fn plain(said: &str) -> String {
    said.chars().filter(|c| !c.is_control()).take(SAID_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The part of NVML that is asked, with numbers that no default would give.
    const FAKE: &str = r#"
        #include <string.h>
        #include <unistd.h>
        typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory;
        typedef struct { unsigned gpu, memory; } rates;
        #ifndef INIT
        #define INIT 0
        #endif
        #ifndef COUNT
        #define COUNT 2
        #endif
        int nvmlInit_v2(void) { return INIT; }
        int nvmlShutdown(void) { return 0; }
        int nvmlSystemGetDriverVersion(char *to, unsigned len) { strncpy(to, "580.95.05", len); return 0; }
        int nvmlDeviceGetCount_v2(unsigned *count) {
        #ifdef HANG
            for (;;) pause();
        #endif
            *count = COUNT;
            return 0;
        }
        int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
        #ifdef LOST
            if (index == LOST) return 15;
        #endif
            *device = (void *)(unsigned long)(index + 1);
            return 0;
        }
        int nvmlDeviceGetUUID(void *device, char *to, unsigned len) {
            strncpy(to, device == (void *)1 ? "GPU-aa" : "GPU-bb", len);
            return 0;
        }
        int nvmlDeviceGetName(void *device, char *to, unsigned len) { strncpy(to, "Fake\n H200", len); return 0; }
        #ifndef OLD
        int nvmlDeviceGetMemoryInfo_v2(void *device, memory *to) {
            to->total = 150754820096ull; to->used = 1234567ull + (unsigned long)device; return 0;
        }
        #endif
        int nvmlDeviceGetUtilizationRates(void *device, rates *to) {
            if (device == (void *)2) return 3;
            to->gpu = 37; to->memory = 5; return 0;
        }
    "#;

    /// A machine that is held up is no driver that hangs.
    const PATIENT: Duration = Duration::from_secs(120);

    fn driver(flags: &[&str], wait: Duration) -> (tempfile::TempDir, Driver) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (source, library) = (folder.path().join("fake.c"), folder.path().join(LIBRARY));
        std::fs::write(&source, FAKE).expect("write");
        let mut cc = std::process::Command::new("cc");
        cc.args(["-shared", "-fPIC", "-o"]).arg(&library).args(flags).arg(&source);
        assert!(cc.status().expect("cc runs").success());
        let driver = Driver::at(library, wait);
        (folder, driver)
    }

    #[test]
    fn gpus_are_told_as_the_driver_tells_them_and_what_it_does_not_tell_is_none() {
        let (_folder, driver) = driver(&[], PATIENT);
        let Seen::Driver { version, gpus, lost } = driver.look() else { panic!("no driver") };
        assert_eq!((version.as_str(), lost, gpus.len()), ("580.95.05", 0, 2));
        let first = Gpu {
            index: 0,
            uuid: "GPU-aa".into(),
            name: "Fake H200".into(),
            memory_total: Some(150_754_820_096),
            memory_used: Some(1_234_568),
            utilisation_percent: Some(37),
        };
        assert_eq!(gpus[0], first);
        assert_eq!((gpus[1].uuid.as_str(), gpus[1].utilisation_percent), ("GPU-bb", None));
    }

    #[test]
    fn an_old_driver_and_a_lost_gpu_hide_nothing_else() {
        let (_folder, driver) = driver(&["-DOLD", "-DLOST=1"], PATIENT);
        let Seen::Driver { gpus, lost, .. } = driver.look() else { panic!("no driver") };
        assert_eq!((gpus.len(), lost), (1, 1));
        assert_eq!((gpus[0].memory_total, gpus[0].utilisation_percent), (None, Some(37)));
    }

    #[test]
    fn a_driver_that_claims_countless_gpus_is_asked_for_a_bounded_number() {
        let (_folder, driver) = driver(&["-DCOUNT=4000000000u"], PATIENT);
        let Seen::Driver { gpus, .. } = driver.look() else { panic!("no driver") };
        assert_eq!(gpus.len(), DEVICES_MAX as usize);
    }

    #[test]
    fn a_driver_that_is_not_loaded_or_not_installed_is_silence_with_a_reason() {
        let (_folder, not_loaded) = driver(&["-DINIT=9"], PATIENT);
        assert_eq!(not_loaded.look(), Seen::Silent("NVIDIA driver is not loaded".into()));
        let nowhere = Driver::at("/nonexistent/libnvidia-ml.so.1".into(), PATIENT);
        let Seen::Silent(why) = nowhere.look() else { panic!("a library that is not there answered") };
        assert!(why.contains("cannot be loaded"), "{why}");
    }

    #[test]
    fn a_driver_that_hangs_is_given_up_and_not_asked_again_meanwhile() {
        let (_folder, driver) = driver(&["-DHANG"], Duration::from_millis(50));
        let silent = Seen::Silent("the driver does not answer".into());
        assert_eq!(driver.look(), silent);
        assert!(driver.stuck.load(Ordering::Acquire));
        assert_eq!(driver.ask(), silent, "no second thread joins the first");
    }
}

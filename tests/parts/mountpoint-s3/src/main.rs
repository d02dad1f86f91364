//! Mounts one prefix of a bucket read-only with the file system crate of Mountpoint for Amazon S3, until SIGINT.
//!
//! `mountpoint-s3-peer ENDPOINT BUCKET PREFIX MOUNTPOINT`, credentials by the usual AWS_ variables. PREFIX is empty or
//! ends in `/`. What is set is what the crate's own program takes when no option is given: parts of 8 MiB, 10 Gb/s as
//! the target, 16 threads, no disk cache. The endpoint, and the style of addressing that a server without DNS needs,
//! are the only choices of ours.

use anyhow::{Context, Result, bail};
use mountpoint_s3_client::config::AddressingStyle;
use mountpoint_s3_client::user_agent::UserAgent;
use mountpoint_s3_fs::data_cache::DataCacheConfig;
use mountpoint_s3_fs::fuse::config::{FuseOptions, FuseSessionConfig, MountPoint};
use mountpoint_s3_fs::memory::{CandidateSize, PagedPool};
use mountpoint_s3_fs::s3::config::{ClientConfig, MemoryLimitSetting, PartConfig, Region, TargetThroughputSetting};
use mountpoint_s3_fs::s3::{Bucket, Prefix, S3Path};
use mountpoint_s3_fs::{MountpointConfig, Runtime, S3FilesystemConfig, Superblock, SuperblockConfig};

const PART_BYTES: usize = 8 << 20;
const FUSE_THREADS: usize = 16;
/// The program takes 95 % of the machine's memory as its limit; this is far above what one reader lets it use.
const MEMORY_BYTES: usize = 8 << 30;

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [endpoint, bucket, prefix, mountpoint] = words.as_slice() else {
        bail!("usage: mountpoint-s3-peer ENDPOINT BUCKET PREFIX MOUNTPOINT");
    };
    let path = S3Path::new(Bucket::new(bucket.as_str())?, Prefix::new(prefix)?);
    let client = ClientConfig {
        region: Region::new_user_specified("us-east-1".to_owned()),
        endpoint_url: Some(endpoint.clone()),
        addressing_style: AddressingStyle::Path,
        dual_stack: false,
        transfer_acceleration: false,
        auth_config: Default::default(),
        requester_pays: false,
        expected_bucket_owner: None,
        throughput_target: TargetThroughputSetting::Default,
        bind: None,
        part_config: PartConfig::with_part_size(PART_BYTES).validate(MemoryLimitSetting::Default(MEMORY_BYTES))?,
        user_agent: UserAgent::new(None),
        tls_config: None,
    };
    let pool = PagedPool::config()
        .with_candidate_sizes([CandidateSize::new(PART_BYTES)])
        .with_memory_limit(MEMORY_BYTES)
        .build();
    let client = client.create_client(pool.clone(), Some(&path)).context("the bucket")?;
    let runtime = Runtime::new(client.event_loop_group());
    let filesystem = S3FilesystemConfig { read_only: true, ..Default::default() };
    let superblock =
        SuperblockConfig { cache_config: filesystem.cache_config.clone(), s3_personality: filesystem.s3_personality };
    let superblock = Superblock::new(client.clone(), path, superblock);
    let options = FuseOptions { read_only: true, ..Default::default() };
    let session = FuseSessionConfig::new(MountPoint::new(mountpoint)?, options, FUSE_THREADS)?;
    let caches = DataCacheConfig { disk_cache_config: None, express_cache_config: None };
    let session =
        MountpointConfig::new(session, filesystem, caches)?.create_fuse_session(superblock, client, runtime, pool)?;
    session.join()
}

//! The records of a real Vault.

use serde_json::{Map, Value};

use super::Records;
use crate::error::Result;
use crate::keys::KeySource;
use crate::mem::Secret;
use crate::refuse;
use crate::vault::{TransitKey, Vault};

pub struct VaultRecords(pub Vault);

impl Records for VaultRecords {
    fn list(&self, mount: &str, path: &str) -> Result<Vec<String>> {
        self.0.kv_list(mount, path)
    }

    fn read(&self, mount: &str, path: &str) -> Result<Option<(Map<String, Value>, u32)>> {
        self.0.kv_read(mount, path, None)
    }

    fn write(&self, mount: &str, path: &str, data: &Map<String, Value>, cas: u32) -> Result<u32> {
        self.0.kv_write(mount, path, data, cas)
    }

    fn unwrap_transit(&self, source: &KeySource, context: &[u8; 32], wrapped: &str) -> Result<Secret<32>> {
        let KeySource::VaultTransit { mount, key } = source else { refuse!(Usage, "{source} is no transit key") };
        let at = TransitKey { mount: mount.clone(), key: key.clone() };
        self.0.transit_unwrap(&at, context, wrapped)
    }
}

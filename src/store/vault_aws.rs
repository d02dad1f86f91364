//! S3 credentials from Vault's aws secrets engine, for `credentials` to hold and replace.

use std::time::Duration;

use super::credentials::{IssueCredentials, Issued};
use crate::error::Result;
use crate::vault::Vault;

/// `aws/creds/ROLE` of one mount.
pub struct VaultAws {
    vault: Vault,
    mount: String,
    role: String,
}

impl VaultAws {
    pub fn new(vault: Vault, mount: &str, role: &str) -> VaultAws {
        VaultAws { vault, mount: mount.to_owned(), role: role.to_owned() }
    }
}

impl IssueCredentials for VaultAws {
    fn issue(&self) -> Result<Issued> {
        let lease = self.vault.aws_credentials(&self.mount, &self.role)?;
        Ok(Issued {
            key_id: lease.key_id,
            secret: lease.secret,
            token: lease.session,
            ttl: Some(lease.ttl).filter(|ttl| !ttl.is_zero()),
            lease_id: Some(lease.lease_id).filter(|id| !id.is_empty()),
            renewable: lease.renewable,
        })
    }

    fn renew(&self, lease_id: &str) -> Result<Duration> {
        self.vault.renew_lease(lease_id)
    }

    fn revoke(&self, lease_id: &str) -> Result<()> {
        self.vault.revoke_lease(lease_id)
    }

    fn describe(&self) -> String {
        format!("vault-aws:{}/{}", self.mount, self.role)
    }
}

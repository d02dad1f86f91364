//! The driver's door to the mounts of this process: `Host`, behind the trait that tests replace.

use std::sync::Arc;
use std::time::Duration;

use super::node::{Door, Shown};
use crate::config::MountPlan;
use crate::error::Result;
use crate::host::{Host, Mounted};

pub struct HostDoor(pub Arc<Host>);

impl Door for HostDoor {
    fn mount(&self, plan: MountPlan, may_enter: &dyn Fn() -> Result<()>) -> Result<Arc<dyn Shown>> {
        Ok(self.0.mount_if(plan, may_enter)?)
    }
}

impl Shown for Mounted {
    fn is_mounted(&self) -> bool {
        Mounted::is_mounted(self)
    }
    fn refuse(&self, why: Option<&str>) -> Result<()> {
        Mounted::refuse(self, why)
    }
    fn recheck(&self) -> Result<()> {
        Mounted::recheck(self)
    }
    fn unmount(&self, grace: Duration) -> Result<()> {
        Mounted::unmount(self, grace)
    }
    fn abandon(&self) -> Result<()> {
        Mounted::abandon(self)
    }
}

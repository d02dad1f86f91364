"""Stands for a program that may mount, as a CSI driver does: mounts, then starts another with the descriptor and without rights.

    open_mount.py MOUNTPOINT OPTIONS COMMAND...

MOUNTPOINT gets a FUSE mount of type fuse.modelfs with OPTIONS (fd and rootmode are added); COMMAND inherits /dev/fuse as
descriptor 3. Taking the mount off again is the caller's.
"""
import ctypes
import os
import sys

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8

mountpoint, options, *command = sys.argv[1:]
device = os.open("/dev/fuse", os.O_RDWR)
if device != 3:
    os.dup2(device, 3)
    os.close(device)
os.set_inheritable(3, True)
libc = ctypes.CDLL(None, use_errno=True)
flags = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC
text = f"fd=3,rootmode=40000,{options}"
if libc.mount(b"modelfs", mountpoint.encode(), b"fuse.modelfs", flags, text.encode()) != 0:
    sys.exit(f"open_mount.py: cannot mount on {mountpoint}: {os.strerror(ctypes.get_errno())}")
os.execvp(command[0], command)

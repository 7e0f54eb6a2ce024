#!/bin/sh -e
# systemd(1) as the first process of namespaces of its own; tests/fuse/test_real_systemd.py.
# real_systemd.sh DIRECTORY; again with "inside" as second argument, in the namespaces.
directory=$1
if [ "$2" != inside ]; then
    # A cgroup of its own, below this one: its systemd takes that for all there is.
    mounted=$(findmnt -n -o TARGET -t cgroup2 | head -n 1)
    own=$mounted$(sed -n 's/^0:://p' /proc/self/cgroup)/healfs-test-$$
    mkdir "$own"
    echo "$own" >"$directory/cgroup"
    echo $$ >"$own/cgroup.procs"
    exec unshare --pid --fork --kill-child --mount --propagation slave --mount-proc \
        --uts --ipc --cgroup "$0" "$directory" inside
fi
# What others unmount outside must not live on here.
findmnt -rn -o TARGET,FSTYPE | sed -n 's/ fuse\..*//p' | xargs -r umount -l || true  # or have unmounted just now
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
mount -t overlay -o "lowerdir=/etc,upperdir=$directory/etc,workdir=$directory/work" overlay /etc
export container=other SYSTEMD_UNIT_PATH="$directory/units"
exec /lib/systemd/systemd --system --unit=test.target --log-target=console --show-status=false

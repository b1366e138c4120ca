#!/bin/busybox sh
# The first program of a guest. It makes the read-only disk writable by a layer in memory, so that one memory
# checkpoint holds all state, and hands over to the guest agent's PID 1.
set -e
bb=/bin/busybox
$bb mount -t devtmpfs dev /dev
for module in $($bb cat /modules/order); do
    $bb insmod "/modules/$module"
done
while [ ! -b /dev/vda ]; do $bb usleep 2000; done
$bb mount -t erofs -o ro /dev/vda /disk
$bb mount -t tmpfs -o mode=755,size=75% layer /layer
$bb mkdir /layer/upper /layer/work
$bb mount -t overlay -o lowerdir=/disk,upperdir=/layer/upper,workdir=/layer/work overlay /root
$bb mount --move /dev /root/dev
exec $bb switch_root /root /usr/bin/env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/root LANG=C.UTF-8 PYTHONPATH=/opt/rollout /usr/bin/python3 -m rollout.sandbox.guest_init

# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
# shellcheck shell=sh
# What the roles nats, gpucache and gpu_worker leave behind, as far as a job can meet it.
set -eu
for gpu in gpu0 gpu1; do
  useradd --system --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin "organism-job-$gpu"
  mkdir -p "/srv/gpucache/$gpu" "/data/gpucache/$gpu" "/run/gpucache/$gpu"
done
# a small disk and a small RAM for the two caches
disk=/dev/disk/by-id/scsi-0QEMU_QEMU_HARDDISK_scratch
mkfs.ext4 -q -F "$disk" 256M
mount "$disk" /srv/gpucache/gpu0
mount -t tmpfs -o size=1G tmpfs /srv/gpucache/gpu1
# no roomier than the cache: who has filled that is not sent on to here
mount -t tmpfs -o size=64M tmpfs /data/gpucache/gpu0
# two device nodes by the names of GPUs, which here are consoles
mkdir -p /dev/dri
for number in 0 1; do
  node=/dev/dri/renderD$((128 + number))
  mknod "$node" c 7 $((1 + number))
  chgrp render "$node"
  chmod 0660 "$node"
done
mkdir -p /etc/organism /var/lib/nats
mkdir -m 0755 /etc/organism/keys
echo SUAKEYOFTHERIG > /etc/organism/keys/worker-gpu0.nk
cat > /etc/organism/gpu-worker.conf << END
JOB_MEMORY_MAX=300M
JOB_TASKS_MAX=64
JOB_TMP_MAX=50M
JOB_DISK_FREE_PERCENT=25
KILL_GRACE_SEC=5
LOG_MAX_MB=1
END
cat > /etc/organism/gpus.json << END
{"version": 1, "gpus": [{"id": "gpu0", "backend": "simulated", "address": "sim:0"},
                        {"id": "gpu1", "backend": "simulated", "address": "sim:1"}]}
END
systemd-run --quiet --unit=bus python3 -m http.server 4222 --bind 127.0.0.1
timeout 60 bash -c 'until (: < /dev/tcp/127.0.0.1/4222) 2>/dev/null; do sleep 0.5; done'

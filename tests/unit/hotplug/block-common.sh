# SPDX-License-Identifier: Apache-2.0
# What block-kemari uses of Xen's functions for hotplug scripts; xenstore is a folder, $STORE.
set -e
command=$1

fatal() {
    echo "$*" >"$STORE/$XENBUS_PATH/hotplug-error"
    exit 1
}
trap 'fatal "$0 failed; error detected."' ERR
log() { echo "$@" >>"$STORE/log"; }
xenstore_read() { cat "$STORE/$1" 2>/dev/null || fatal "xenstore-read $1 failed."; }
xenstore_read_default() { cat "$STORE/$1" 2>/dev/null || echo "$2"; }
xenstore_write() { echo "$2" >"$STORE/$1"; }
xenstore-exists() { [ -e "$STORE/$1" ]; }
canonicalise_mode() { case $1 in *w*) echo w ;; *) echo r ;; esac; }
claim_lock() { mkdir "$STORE/lock-$1"; }
release_lock() { rmdir "$STORE/lock-$1"; }
write_dev() { xenstore_write "$XENBUS_PATH/physical-device-path" "$1"; xenstore_write "$XENBUS_PATH/physical-device" 2b:0; }

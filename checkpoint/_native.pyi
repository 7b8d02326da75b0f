# SPDX-License-Identifier: Apache-2.0
from checkpoint._twin import active_writable as active_writable
from checkpoint._twin import apply_batch as apply_batch
from checkpoint._twin import count_set as count_set
from checkpoint._twin import encode_pages as encode_pages
from checkpoint._twin import first_set as first_set
from checkpoint._twin import first_unmet as first_unmet
from checkpoint._twin import forget_pages as forget_pages
from checkpoint._twin import gather as gather
from checkpoint._twin import receive_ring_whole as receive_ring_whole
from checkpoint._twin import scan_bitmap as scan_bitmap
from checkpoint._twin import stage as stage
from checkpoint._twin import subtract as subtract
from checkpoint._twin import verify_batch as verify_batch
from checkpoint._twin import xor as xor

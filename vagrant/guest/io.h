// SPDX-License-Identifier: Apache-2.0
#ifndef IO_H
#define IO_H
#include <stdio.h>

// Carry out "io DEVICE read|write sequential|random SIZE DEPTH SECONDS" and write one line of answer.
void measure_io(FILE *out, const char *line);

#endif

/* What every measuring program here needs: the time, and a way out. */
#ifndef BENCH_H
#define BENCH_H

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

/* End with what the last call says of itself. */
static void fail(const char *what)
{
	perror(what);
	exit(1);
}

/* Nanoseconds, from no point in particular. */
static long long now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

#endif

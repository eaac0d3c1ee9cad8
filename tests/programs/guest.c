/* The only program of a guest whose memory is a file: shows a page of it to whoever maps the file.
 *
 * The page begins with a mark, made at run time so that it stands nowhere else in memory. Then come
 * words, which the two sides take turns to write:
 *   [4] the host's    1: we have seen you; 2: go on writing; 3: end
 *   [5] the guest's   1: we have seen you too
 *   [6] the guest's   how often it has looked at [4] since then, in thousands
 * What it prints goes to the serial console.
 */
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <unistd.h>

int main(void)
{
	volatile uint64_t *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE,
				       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t seed = 0x9e3779b97f4a7c15u ^ (uint64_t)getpid();

	mlock((void *)page, 4096);
	for (int i = 0; i < 4; i++) {
		page[i] = seed * (uint64_t)(2 * i + 3);
	}
	puts("guest: up");
	fflush(stdout);
	while (page[4] != 1) {
	}
	page[5] = 1;
	puts("guest: seen");
	fflush(stdout);
	for (uint64_t looks = 0; page[4] != 3; looks++) {
		if (page[4] == 2 && looks % 1000 == 0) {
			page[6] = looks / 1000;
		}
	}
	puts("guest: end");
	fflush(stdout);
	sync();
	reboot(RB_AUTOBOOT);
	return 1;
}

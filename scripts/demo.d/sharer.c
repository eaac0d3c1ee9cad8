/* A program that knows nothing of msharefs: maps a file and answers "get OFFSET" and
 * "put OFFSET VALUE", a line each, until its input ends. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

int main(int argc, char **argv)
{
	if (argc != 3)
		return 2;
	size_t length = strtoull(argv[2], NULL, 0);
	int fd = open(argv[1], O_RDWR);
	if (fd < 0) {
		perror(argv[1]);
		return 1;
	}
	unsigned char *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (memory == MAP_FAILED) {
		perror("mmap");
		return 1;
	}
	char word[8];
	unsigned long long offset;
	while (scanf("%7s %llu", word, &offset) == 2 && offset < length) {
		unsigned int value;
		if (word[0] == 'p') {
			if (scanf("%u", &value) != 1)
				return 2;
			memory[offset] = (unsigned char)value;
		}
		printf("%u\n", (unsigned int)memory[offset]);
		fflush(stdout);
	}
	return 0;
}

/* Changes the middle of a region as fast as it can, until its input ends.
 *
 *   changer PATH SIZE [watch]    PROTECT of all but the first and the last page, r-- and rw- in turn;
 *                                with "watch" it also watches them anew each time
 *
 * Prints the number of changes, and the errno of the first one that failed, or 0.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
#include "msharefs.h"

int main(int count, char **arguments)
{
    int fd = open(arguments[1], O_RDWR), error = 0;
    uint64_t size = strtoul(arguments[2], NULL, 0);
    long changes = 0;
    if (fd < 0)
        return 2;
    printf("ready\n");
    fflush(stdout);
    while (!poll(&(struct pollfd){0, POLLIN, 0}, 1, 0)) {
        struct mshare_protect protect = {4096, size - 8192, PROT_READ | (changes % 2 ? PROT_WRITE : 0), 0};
        struct mshare_notify notify = {4096, size - 8192, MSHAREFS_NOTIFY_WRITE, MSHAREFS_NOTIFY_LOG, 0, 0, 0, 0};
        if (ioctl(fd, MSHAREFS_PROTECT, &protect) || (count > 3 && ioctl(fd, MSHAREFS_NOTIFY, &notify))) {
            if (!error)
                error = errno;
        }
        changes++;
    }
    printf("%ld %d\n", changes, error);
    return 0;
}

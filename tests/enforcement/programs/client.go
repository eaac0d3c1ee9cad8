// The program of client.c in Go: its runtime makes system calls without the C library, keeps threads
// of its own, and turns a fault into a panic.
package main

import (
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"unsafe"
)

var base uintptr
var length uintptr

func say(text string) { syscall.Write(1, []byte(text+"\n")) }

func number(text string) int { n, _ := strconv.Atoi(text); return n }

func nextLine() string {
	line, one := []byte{}, make([]byte, 1)
	for {
		if n, _ := syscall.Read(0, one); n != 1 {
			os.Exit(0)
		}
		if one[0] == '\n' {
			return string(line)
		}
		line = append(line, one[0])
	}
}

func failed(err syscall.Errno) string { return "errno " + strconv.Itoa(int(err)) }

func doIt(w []string) (answer string) {
	defer func() {
		if p := recover(); p != nil {
			at, is := p.(interface{ Addr() uintptr })
			if !is {
				panic(p)
			}
			answer = "segv " + strconv.FormatUint(uint64(at.Addr()), 16)
		}
	}()
	switch w[0] {
	case "map":
		mode := syscall.O_RDONLY
		if w[2] == "rw" {
			mode = syscall.O_RDWR
		}
		fd, err := syscall.Open(w[1], mode, 0)
		if err != nil {
			return failed(err.(syscall.Errno))
		}
		at, _, code := syscall.Syscall6(syscall.SYS_MMAP, 0, uintptr(number(w[4])),
			uintptr(number(w[5])), syscall.MAP_SHARED, uintptr(fd), uintptr(number(w[3])))
		syscall.Close(fd)
		if code != 0 {
			return failed(code)
		}
		base, length = at, uintptr(number(w[4]))
		return "at " + strconv.FormatUint(uint64(at), 16)
	case "load":
		return "value " + strconv.Itoa(int(*(*byte)(unsafe.Pointer(base + uintptr(number(w[1]))))))
	case "store":
		*(*byte)(unsafe.Pointer(base + uintptr(number(w[1])))) = byte(number(w[2]))
		return "stored 0"
	case "in", "out":
		mode, call := syscall.O_RDONLY, uintptr(syscall.SYS_READ)
		if w[0] == "out" {
			mode, call = syscall.O_WRONLY, syscall.SYS_WRITE
		}
		fd, _ := syscall.Open(w[2], mode, 0)
		count, _, code := syscall.Syscall(call, uintptr(fd), base+uintptr(number(w[1])), 1)
		syscall.Close(fd)
		if code != 0 {
			return failed(code)
		}
		return "count " + strconv.Itoa(int(count))
	case "unmap":
		_, _, code := syscall.Syscall(syscall.SYS_MUNMAP, base, length, 0)
		return "result " + strconv.Itoa(int(code))
	}
	return "what 0"
}

func main() {
	syscall.RawSyscall(syscall.SYS_PRCTL, syscall.PR_SET_PDEATHSIG, uintptr(syscall.SIGKILL), 0)
	debug.SetPanicOnFault(true)
	say("ready " + strconv.Itoa(os.Getpid()))
	for {
		say(doIt(strings.Fields(nextLine())))
	}
}

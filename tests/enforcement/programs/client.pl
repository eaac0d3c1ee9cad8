# The program of client.c in Perl, with Sys::Mmap: a mapping is a string.
use strict;
use warnings;
use Fcntl;
use POSIX ();
use Sys::Mmap;

my ($memory, $fh);
$| = 1;
$SIG{CHLD} = 'IGNORE';
syscall(157, 1, 9); # prctl(PR_SET_PDEATHSIG, SIGKILL)

# Not at the interpreter's leisure, as %SIG would have it: the access would be made again before.
POSIX::sigaction(POSIX::SIGSEGV(), POSIX::SigAction->new(
    sub { my ($name, $info) = @_; die sprintf("segv %x\n", $info->{addr}) },
    POSIX::SigSet->new(), POSIX::SA_SIGINFO() | POSIX::SA_NODEFER()));

sub say_line { syswrite(STDOUT, "$_[0]\n") }

sub next_line {
    my $line = '';
    until ($line =~ /\n\z/) {
        sysread(STDIN, my $byte, 1) or exit 0;
        $line .= $byte;
    }
    return $line;
}

sub do_it {
    my ($what, @a) = @_;
    if ($what eq 'map') {
        sysopen($fh, $a[0], $a[1] eq 'rw' ? O_RDWR : O_RDONLY) or return 'errno ' . ($! + 0);
        $memory = '';
        eval { mmap($memory, $a[3], $a[4], MAP_SHARED, $fh, $a[2]); 1 } or return 'errno ' . ($! + 0);
        return 'mapped';
    }
    if ($what eq 'load') { return 'value ' . vec($memory, $a[0], 8) }
    if ($what eq 'store') { vec($memory, $a[0], 8) = $a[1]; return 'stored 0' }
    if ($what eq 'in' || $what eq 'out') {
        sysopen(my $file, $a[1], $what eq 'in' ? O_RDONLY : O_WRONLY) or return 'errno ' . ($! + 0);
        # sysread would read to a string of its own first; this is what it does then.
        my $at = unpack('J', pack('p', $memory)) + $a[0];
        my $count = syscall($what eq 'in' ? 0 : 1, fileno($file), $at, 1);
        return $count < 0 ? 'errno ' . ($! + 0) : "count $count";
    }
    if ($what eq 'unmap') { munmap($memory); return 'result 0' }
    if ($what eq 'fork') {
        my $pid = fork();
        return "pid $pid" if $pid;
        POSIX::dup2(POSIX::open($a[0], POSIX::O_RDONLY()), 0);
        POSIX::dup2(POSIX::open($a[1], POSIX::O_WRONLY()), 1);
        return undef;
    }
    return 'what 0';
}

say_line("ready $$");
while (1) {
    my @words = split ' ', next_line();
    my $answer = eval { do_it(@words) };
    $answer = $@ =~ s/\n.*//sr if $@;
    say_line($answer) if defined $answer;
}
